#include "transport/nccl.h"

#include "mooncake_ep.h"

#include "base/env.h"

#include <dlfcn.h>

namespace ep {
namespace {

// The library that the environment names, or the one that the process has or finds.
Nccl load_named(const char *name, const char *library, const char *prefix) {
    const std::string named = env_text("MOONCAKE_EP_NCCL_LIBRARY");
    if (named != "none") return Nccl::load(name, named.empty() ? library : named.c_str(), prefix);
    Nccl none;
    none.name = name;
    none.problem = "MOONCAKE_EP_NCCL_LIBRARY is none";
    return none;
}

}  // namespace

const Nccl &Nccl::of(int32_t backend) {
    static const Nccl nccl = load_named("NCCL", "libnccl.so.2", "nccl");
    static const Nccl mccl = load_named("MCCL", "libmccl.so", "mccl");
    return backend == MEP_BACKEND_MACA ? mccl : nccl;
}

int Nccl::version() const {
    int number = 0;
    return problem.empty() && get_version(&number) == kSuccess ? number : 0;
}

Nccl Nccl::load(const char *name, const char *library, const std::string &prefix) {
    Nccl nccl;
    nccl.name = name;
    // Stays loaded: it has started threads.
    void *const loaded = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (loaded == nullptr) {
        nccl.problem = std::string(name) + " cannot be loaded: " + dlerror();
        return nccl;
    }
    const auto look_for = [&](const char *function, auto *pointer) {
        using Pointer = std::remove_pointer_t<decltype(pointer)>;
        *pointer = reinterpret_cast<Pointer>(dlsym(loaded, (prefix + function).c_str()));
    };
    const auto find = [&](const char *function, auto *pointer) {
        look_for(function, pointer);
        if (*pointer == nullptr) nccl.problem = library + (" has no " + prefix) + function;
    };
    find("GetVersion", &nccl.get_version);
    find("GetUniqueId", &nccl.get_unique_id);
    find("CommInitRank", &nccl.init_rank);
    find("CommDestroy", &nccl.destroy);
    find("CommAbort", &nccl.abort);
    find("CommGetAsyncError", &nccl.get_async_error);
    find("GroupStart", &nccl.group_start);
    find("GroupEnd", &nccl.group_end);
    find("Send", &nccl.send);
    find("Recv", &nccl.receive);
    find("GetErrorString", &nccl.error_text);
    look_for("MemAlloc", &nccl.allocate);
    look_for("MemFree", &nccl.release);
    look_for("CommRegister", &nccl.enlist);
    look_for("CommDeregister", &nccl.strike_off);
    return nccl;
}

}  // namespace ep

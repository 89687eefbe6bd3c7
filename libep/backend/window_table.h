// The windows of this process by number, so that ranks that are threads share one mapping. Weak:
// the number of a window that is gone finds nothing, where an address would find anything.
#pragma once

#include "backend/backend.h"

#include <map>
#include <memory>
#include <mutex>

namespace ep {

class WindowTable {
  public:
    static WindowTable &instance() {
        static WindowTable table;
        return table;
    }
    uint64_t add(const std::shared_ptr<Mapping> &mapping) {
        const std::lock_guard<std::mutex> lock(mutex_);
        mappings_[++last_] = mapping;
        return last_;
    }
    void remove(uint64_t number) {
        const std::lock_guard<std::mutex> lock(mutex_);
        mappings_.erase(number);
    }
    std::shared_ptr<Mapping> find(uint64_t number) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = mappings_.find(number);
        return found == mappings_.end() ? nullptr : found->second.lock();
    }

  private:
    std::mutex mutex_;
    uint64_t last_ = 0;
    std::map<uint64_t, std::weak_ptr<Mapping>> mappings_;
};

}  // namespace ep

// Words for rows on devices with warps of scalar lanes; emu.h, cuda.h and maca.h share them.
// Included inside the device's namespace.

constexpr int kPack = 8;  // 16 bytes of a 2-byte type
constexpr int kPackMin = kPack;

template <int kCount>
struct Pack {
    float lane[kCount];
};

// A pack in memory is moved in as few accesses as 16 bytes allow.
constexpr int access_bytes(int bytes) {
    return bytes < 16 ? bytes : 16;
}
// A pack as it lies in memory. Words, as a smaller type would take a register for each element.
template <int kBytes>
struct alignas(access_bytes(kBytes)) Words {
    uint32_t word[kBytes / sizeof(uint32_t)];
};

template <class Type, int kCount>
EP_DEVICE Words<sizeof(typename Type::Storage) * kCount> fetch(const char *from) {
    return *reinterpret_cast<const Words<sizeof(typename Type::Storage) * kCount> *>(from);
}
// The same from a row that nobody writes during the launch, and of which this is the only use.
template <class Type, int kCount>
EP_DEVICE Words<sizeof(typename Type::Storage) * kCount> fetch_row(const char *from) {
    using Raw = Words<sizeof(typename Type::Storage) * kCount>;
    if constexpr (sizeof(Raw) % sizeof(Vector) != 0) {
        return fetch<Type, kCount>(from);
    } else {
        struct {
            Vector vectors[sizeof(Raw) / sizeof(Vector)];
        } loaded;
        EP_UNROLL
        for (size_t i = 0; i < sizeof(Raw) / sizeof(Vector); ++i)
            loaded.vectors[i] = pass_load_constant(reinterpret_cast<const Vector *>(from) + i);
        Raw raw;
        __builtin_memcpy(&raw, &loaded, sizeof raw);
        return raw;
    }
}
template <class Type, int kCount>
EP_DEVICE Pack<kCount> widen(const Words<sizeof(typename Type::Storage) * kCount> &raw) {
    constexpr int kInWord = sizeof(uint32_t) / sizeof(typename Type::Storage);
    Pack<kCount> values;
    EP_UNROLL
    for (int i = 0; i < kCount; ++i) {
        const uint32_t word = raw.word[i / kInWord];
        const uint32_t bits = kInWord == 1 ? word : word >> i % kInWord * 16 & 0xffff;
        values.lane[i] = Type::template decode<float, uint32_t>(bits);
    }
    return values;
}
template <class Type, int kCount>
EP_DEVICE void narrow(char *to, const Pack<kCount> &values) {
    constexpr int kBits = 8 * sizeof(typename Type::Storage), kInWord = 32 / kBits;
    Words<sizeof(typename Type::Storage) * kCount> raw = {};
    if constexpr (kCastsPairs && kInWord == 2) {
        EP_UNROLL
        for (int i = 0; i < kCount; i += 2)
            raw.word[i / 2] = cast_pair<Type::kElement>(values.lane[i], values.lane[i + 1]);
    } else {
        EP_UNROLL
        for (int i = 0; i < kCount; ++i)
            raw.word[i / kInWord] |= Type::template encode<uint32_t, float>(values.lane[i])
                                     << i % kInWord * kBits;
    }
    *reinterpret_cast<decltype(raw) *>(to) = raw;
}
template <int kCount>
EP_DEVICE void add(Pack<kCount> *sum, const Pack<kCount> &values) {
    EP_UNROLL
    for (int i = 0; i < kCount; ++i)
        sum->lane[i] += values.lane[i];
}
template <int kCount>
EP_DEVICE Pack<kCount> scaled(float factor, const Pack<kCount> &values) {
    Pack<kCount> product;
    EP_UNROLL
    for (int i = 0; i < kCount; ++i)
        product.lane[i] = factor * values.lane[i];
    return product;
}
template <int kCount, int kPacks>
EP_DEVICE float max_magnitude(const Pack<kCount> (&packs)[kPacks]) {
    float largest = 0;
    EP_UNROLL
    for (int pack = 0; pack < kPacks; ++pack) {
        EP_UNROLL
        for (int i = 0; i < kCount; ++i) {
            // One that is no number is passed over.
            largest = __builtin_fmaxf(largest, __builtin_fabsf(packs[pack].lane[i]));
        }
    }
    return largest;
}

template <class Group, int kLoadsInFlight, class To>
EP_DEVICE void fan_out(int count, To to, const char *from, size_t bytes, Caching) {
    const int vectors = static_cast<int>(bytes / sizeof(Vector));
    for (int first = Group::rank(); first < vectors; first += kLoadsInFlight * Group::size()) {
        Vector loaded[kLoadsInFlight] = {};
        EP_UNROLL
        for (int i = 0; i < kLoadsInFlight; ++i) {
            const int v = first + i * Group::size();
            if (v < vectors) loaded[i] = pass_load(reinterpret_cast<const Vector *>(from) + v);
        }
        for (int target = 0; target < count; ++target) {
            char *row = to(target);
            if (row == nullptr) continue;
            EP_UNROLL
            for (int i = 0; i < kLoadsInFlight; ++i) {
                const int v = first + i * Group::size();
                if (v < vectors) pass_store(reinterpret_cast<Vector *>(row) + v, loaded[i]);
            }
        }
    }
}

constexpr int kPacksAtOnce = 3;  // of a row, beside each other
constexpr int kTermLoads = 12;   // of a lane that sums rows, in flight together

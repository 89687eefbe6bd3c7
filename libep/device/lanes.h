// Words for rows on devices with warps of scalar lanes; emu.h and cuda.h share them.
// Included inside the device's namespace.

constexpr int kPack = 8;  // 16 bytes of a 2-byte type
constexpr int kPackMin = kPack;

template <int kCount>
struct Pack {
    float lane[kCount];
};

// A pack in memory, moved in as few accesses as 16 bytes allow.
constexpr int access_bytes(int bytes) {
    return bytes < 16 ? bytes : 16;
}
template <class Storage, int kCount>
struct alignas(access_bytes(sizeof(Storage) * kCount)) RawPack {
    Storage lane[kCount];
};

template <class Type, int kCount>
EP_DEVICE Pack<kCount> widen(const char *from) {
    using Raw = RawPack<typename Type::Storage, kCount>;
    const Raw raw = *reinterpret_cast<const Raw *>(from);
    Pack<kCount> values;
    EP_UNROLL
    for (int i = 0; i < kCount; ++i)
        values.lane[i] = Type::template decode<float, uint32_t>(raw.lane[i]);
    return values;
}
template <class Type, int kCount>
EP_DEVICE void narrow(char *to, const Pack<kCount> &values) {
    using Raw = RawPack<typename Type::Storage, kCount>;
    Raw raw;
    EP_UNROLL
    for (int i = 0; i < kCount; ++i)
        raw.lane[i] = static_cast<typename Type::Storage>(
            Type::template encode<uint32_t, float>(values.lane[i]));
    *reinterpret_cast<Raw *>(to) = raw;
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
            const float value = packs[pack].lane[i];
            const float magnitude = value < 0 ? -value : value;
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    return largest;
}

constexpr int kLoadsInFlight = 4;  // of a lane

template <class Group>
EP_DEVICE void fan_out(char *const (&to)[kFanOut], int count, const char *from, size_t begin,
                       size_t end, Caching) {
    const int vectors = static_cast<int>(end / sizeof(Vector));
    for (int first = static_cast<int>(begin / sizeof(Vector)) + Group::rank(); first < vectors; first += kLoadsInFlight * Group::size()) {
        Vector loaded[kLoadsInFlight];
        EP_UNROLL
        for (int i = 0; i < kLoadsInFlight; ++i) {
            const int v = first + i * Group::size();
            if (v < vectors) loaded[i] = reinterpret_cast<const Vector *>(from)[v];
        }
        EP_UNROLL
        for (int target = 0; target < kFanOut; ++target) {
            if (target >= count) break;
            EP_UNROLL
            for (int i = 0; i < kLoadsInFlight; ++i) {
                const int v = first + i * Group::size();
                if (v < vectors) reinterpret_cast<Vector *>(to[target])[v] = loaded[i];
            }
        }
    }
}

constexpr int kTermsAtOnce = 4;  // rows of a sum whose loads are in flight together

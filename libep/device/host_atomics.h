// Memory words of the vocabulary on host threads; the CPU and the emulated GPU share them. Included
// inside the device's namespace by cpu.h and emu.h.

template <class T>
T load(const T *from) {
    return __atomic_load_n(from, __ATOMIC_RELAXED);
}
template <class T>
void store(T *to, T value) {
    __atomic_store_n(to, value, __ATOMIC_RELAXED);
}
template <class T>
T fetch_add(T *to, T value) {
    return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <class T>
T swap(T *to, T value) {
    return __atomic_exchange_n(to, value, __ATOMIC_RELAXED);
}

// Also ordered like publish and observe: here there is no boundary between launches that orders
// what the rounds before did.
inline void post(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
inline uint64_t look(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
inline void publish(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
inline uint64_t leave(uint64_t *word, uint64_t value) {
    return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}
inline void after_leavers(const uint64_t *word) {
    look(word);
}
template <class Group>
void before_publish() {
    Group::sync();
}
template <class Group>
uint64_t observe(const uint64_t *word) {
    return Group::broadcast(Group::rank() == 0 ? __atomic_load_n(word, __ATOMIC_ACQUIRE) : 0);
}

inline void after_launches_before() {}  // a launch here is a call

inline uint64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return uint64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// Spins for a while, then lets others run: there may be more ranks than cores. On a loaded machine
// that may take as long as a turn of each, so the clock is asked after every one.
constexpr uint32_t kSpins = 64;
inline bool clock_is_due(uint32_t attempt) {
    return attempt >= kSpins;
}
inline void pause(uint32_t attempt) {
    if (attempt >= kSpins) {
        sched_yield();
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

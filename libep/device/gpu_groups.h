// Groups of a GPU's threads that do not depend on the width of its warps; cuda.h and maca.h share
// them. Included inside the device's namespace.

struct Votes {
    int total;  // lanes where it is true
    int lower;  // of them, those before this lane
};

struct Thread {
    EP_DEVICE static int rank() { return 0; }
    EP_DEVICE static int size() { return 1; }
    EP_DEVICE static void sync() {}
    EP_DEVICE static int index_in_block() { return threadIdx.x; }
    EP_DEVICE static int count_in_block() { return blockDim.x; }
    template <class T>
    EP_DEVICE static T broadcast(T value) {
        return value;
    }
};

struct Block {
    EP_DEVICE static int rank() { return threadIdx.x; }
    EP_DEVICE static int size() { return blockDim.x; }
    EP_DEVICE static void sync() { __syncthreads(); }
    EP_DEVICE static int index_in_block() { return 0; }
    EP_DEVICE static int count_in_block() { return 1; }
};

template <class Group>
EP_DEVICE int grid_index() {
    return blockIdx.x * Group::count_in_block() + Group::index_in_block();
}
template <class Group>
EP_DEVICE int grid_count() {
    return gridDim.x * Group::count_in_block();
}

/* SPDX-License-Identifier: Apache-2.0 */
/**
 * mooncake_ep.h - the whole public API of libmooncake_ep, and its manual.
 *
 * A Mixture-of-Experts layer spread over R ranks has two collective operations around its experts:
 *
 *   dispatch  every token travels to the ranks that own its top-k experts, and is packed there by
 *             expert;
 *   combine   the experts' outputs travel back and are summed with the top-k weights.
 *
 * The shortest program: mep_group_create, mep_buffer_create, mep_handle_create, then for each layer
 * mep_dispatch, the experts, mep_combine. Release in the reverse order.
 *
 * Symbols: R ranks, E global experts, L = E/R experts on each rank (rank r owns [r*L, (r+1)*L)), T
 * tokens of this rank in this call, M the most tokens of one rank in one call, H hidden, K top-k.
 *
 * Rules that hold for every declaration below:
 *  - A function returns mep_status_t and writes its outputs only on MEP_OK. A failed call has sent
 *    nothing and leaves group, buffer and handle as they were, unless its comment says otherwise.
 *  - mep_last_error() then names the argument, its value and the rule it broke.
 *  - A struct starts with struct_size = sizeof the struct; zero in any other field means "default".
 *  - *_destroy accepts NULL and cannot fail.
 *  - Text that a function returns lives as long as the object it describes; text of no object lives
 *    for ever.
 *  - "Collective": every rank of the group calls it, in the same order, with the same sizes.
 *    "Local": no other rank takes part. "Blocking": returns when the work is done.
 *    "Stream-ordered": on a GPU the work is queued on args.stream and the call returns at once; on
 *    the CPU the call does the work and blocks.
 *  - One group, and the buffers and handles made from it, belong to one thread at a time. Different
 *    groups may be used by different threads.
 */
#ifndef MOONCAKE_EP_H_
#define MOONCAKE_EP_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MEP_API __attribute__((visibility("default")))
#else
#define MEP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Version and limits ---------------------------------------------------------------------- */

#define MEP_VERSION_MAJOR 0
#define MEP_VERSION_MINOR 1
#define MEP_VERSION_PATCH 0

#define MEP_RANK_COUNT_MAX 1024    /**< R */
#define MEP_EXPERT_COUNT_MAX 65536 /**< E; a multiple of R */
#define MEP_TOKEN_COUNT_MAX 65536  /**< M; and E * M < 2^31, R * M < 2^24 */
#define MEP_TOPK_MAX 32            /**< K */
#define MEP_HIDDEN_MULTIPLE 8      /**< H is a multiple of this */
#define MEP_HIDDEN_MAX 65536       /**< H */
#define MEP_SCALE_GROUP 128 /**< channels of one FP8 scale; with FP8, H is a multiple of it */
#define MEP_ROUNDS_IN_FLIGHT_MAX 8 /**< F */
#define MEP_ALIGNMENT 16           /**< bytes; data of x, out_x, out and of every row of them */
#define MEP_CPU_THREAD_COUNT_MAX 256
#define MEP_SM_COUNT_MIN 3 /**< one to count, one to send, one to receive */
#define MEP_UNIQUE_ID_BYTES 128
#define MEP_ALL_GATHER_BYTES_MAX 1048576

/** Library version, MAJOR * 10000 + MINOR * 100 + PATCH. Local. */
MEP_API int32_t mep_version(void);

/* ---- Status, last error, log ----------------------------------------------------------------- */

/**
 * Outcome of a call. Negative values are errors, in ranges by what they cost; new ones may be
 * added.
 */
typedef int32_t mep_status_t;
enum {
    MEP_OK = 0,
    /* -1xx: this call was wrong; everything goes on as before. */
    MEP_INVALID_ARGUMENT = -101, /**< an argument broke a documented rule */
    MEP_UNSUPPORTED = -102,      /**< valid, but not on this device, build or version */
    MEP_INVALID_STATE = -103, /**< not now: too many rounds in flight, nothing to receive, closed */
    /* -2xx: this device or host could not. */
    MEP_OUT_OF_MEMORY = -201,
    MEP_DEVICE_ERROR = -202, /**< a call of the device's runtime failed */
    MEP_SYSTEM_ERROR = -203, /**< a call of the operating system failed */
    /* -3xx: a peer did not do its part. */
    MEP_PEER_FAILED = -301, /**< a peer missed the deadline and was masked out; see mep_dispatch */
    /* -4xx: the group did not come together. */
    MEP_TIMEOUT = -401,         /**< a collective step of set-up missed its deadline */
    MEP_MISMATCH = -402,        /**< the ranks gave different sizes or versions */
    MEP_BOOTSTRAP_FAILED = -403 /**< the connection or callback that joins the ranks failed */
};

/**
 * Name of a status, e.g. "MEP_PEER_FAILED"; "MEP_UNKNOWN_STATUS" for any other number. Never NULL.
 * Local.
 */
MEP_API const char *mep_status_name(mep_status_t status);

/**
 * What went wrong in this thread's last failed call; "" before any. Valid until the next one. Never
 * NULL. Local.
 */
MEP_API const char *mep_last_error(void);

enum { MEP_LOG_ERROR = 1, MEP_LOG_WARNING = 2, MEP_LOG_INFO = 3, MEP_LOG_DEBUG = 4 };

/**
 * Receives one log line without newline. May be called from any thread, and may call the library; a
 * call that has begun may still run when mep_log_set_callback returns.
 */
typedef void (*mep_log_callback_t)(void *context, int32_t level, const char *message);

/**
 * Send log lines up to `level` to `callback`; NULL: to standard error. Without this call the level
 * is MOONCAKE_EP_LOG (error, warning, info or debug; default warning). Local, process-wide.
 * Errors: MEP_INVALID_ARGUMENT if level is not one of MEP_LOG_*.
 */
MEP_API mep_status_t mep_log_set_callback(mep_log_callback_t callback, void *context,
                                          int32_t level);

/* ---- Backends -------------------------------------------------------------------------------- */

/** Which runtime a group computes with. 0 in a config means MEP_BACKEND_CPU. */
enum { MEP_BACKEND_CPU = 1, MEP_BACKEND_CUDA = 2, MEP_BACKEND_MACA = 3 };

typedef struct mep_backend_info {
    uint32_t struct_size;
    int32_t available;    /**< 1: a group can be created on it now */
    int32_t device_count; /**< devices that this process sees; 1 on the CPU */
    uint32_t reserved;
    const char *name;   /**< "cpu", "cuda" or "maca"; in a build for tests "maca (shim ...)" */
    const char *reason; /**< why it is not available; "" if it is */
} mep_backend_info_t;

/** Describe a backend (MEP_BACKEND_*), also one that is not in this build. Local. */
MEP_API mep_status_t mep_backend_query(int32_t backend, mep_backend_info_t *info);

typedef struct mep_rdma_info {
    uint32_t struct_size;
    int32_t available;    /**< 1: rows may go by GPU-initiated RDMA; 0 in this version */
    int32_t device_count; /**< RDMA devices that libibverbs finds, of any kind */
    uint32_t reserved;
    const char *reason; /**< why it is not used */
} mep_rdma_info_t;

/**
 * Tell whether GPU-initiated RDMA can be used on this machine. A machine without it, or without
 * libibverbs, is no error: ranks then reach each other peer to peer only. Local.
 */
MEP_API mep_status_t mep_rdma_query(mep_rdma_info_t *info);

/* ---- Tensors --------------------------------------------------------------------------------- */

/** Device codes of DLPack. MetaX arrays arrive as MEP_DEVICE_CUDA. */
enum { MEP_DEVICE_CPU = 1, MEP_DEVICE_CUDA = 2 };

/** Type codes of DLPack. An 8-bit MEP_TYPE_UINT is accepted wherever MEP_TYPE_FLOAT8_E4M3FN is. */
enum {
    MEP_TYPE_INT = 0,
    MEP_TYPE_UINT = 1,
    MEP_TYPE_FLOAT = 2,
    MEP_TYPE_BFLOAT = 4,
    MEP_TYPE_FLOAT8_E4M3FN = 10
};

typedef struct mep_device {
    int32_t device_type;
    int32_t device_id;
} mep_device_t;

typedef struct mep_dtype {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes; /**< 1 */
} mep_dtype_t;

/**
 * A borrowed array: byte for byte DLPack's DLTensor, so a DLTensor * may be passed as it is. The
 * library reads it only during the call; the data must stay valid until the call's work is done.
 */
typedef struct mep_tensor {
    void *data;
    mep_device_t device;
    int32_t ndim;
    mep_dtype_t dtype;
    int64_t *shape;
    int64_t *strides; /**< in elements; NULL: row-major without gaps */
    uint64_t byte_offset;
} mep_tensor_t;

/* ---- Topology -------------------------------------------------------------------------------- */

/** GPUs, NICs and NUMA nodes of a machine, and how they are linked. */
typedef struct mep_topology mep_topology_t;

/**
 * Read what Linux tells in the sysfs below `root`; NULL: of this machine, and UUIDs from NVIDIA's
 * management library, if it is there. GPUs are in the order of their PCI addresses. Links other
 * than PCI's are not in it; see mep_topology_apply_smi. A machine without GPUs and NICs is no
 * error. Local. Errors: MEP_SYSTEM_ERROR (names the file that cannot be read, or the NIC without a
 * port).
 */
MEP_API mep_status_t mep_topology_read(const char *root, mep_topology_t **topology);

/**
 * Load what mep_topology_text gave, here or on another machine. Local.
 * Errors: MEP_INVALID_ARGUMENT (names the line and what is wrong with it).
 */
MEP_API mep_status_t mep_topology_load(const char *text, mep_topology_t **topology);

/**
 * Link GPUs as `tool`, "nvidia-smi" or "mx-smi", says: `text` is what `TOOL topo -m` printed.
 * Local. Errors: MEP_INVALID_ARGUMENT (names the row, the column and the cell); nothing is changed
 * then.
 */
MEP_API mep_status_t mep_topology_apply_smi(mep_topology_t *topology, const char *tool,
                                            const char *text);

/**
 * The topology as lines of text, until it is changed or destroyed: `numa N`; `gpu INDEX VENDOR
 * PCI_PATH numa N uuid UUID`; `nic NAME PORT_STATE LINK_LAYER PCI_PATH numa N`; `link gpu N gpu|nic
 * M KIND`, where KIND is NV<lanes>, MX, PIX, PXB, PHB, NODE, SYS, PROC or SHM, and `-` is nothing
 * known. Local.
 */
MEP_API mep_status_t mep_topology_text(const mep_topology_t *topology, const char **text);

/**
 * The NIC for a GPU: the nearest by PCI path whose port is active, GPUs in their order, ties spread
 * over the NICs. `filter`: a comma list of NICs to choose from, "" for all; NULL:
 * MOONCAKE_EP_DEVICE_FILTER, or all. *name is "" if no port is active; it lives until the next call
 * with this topology. Local.
 * Errors: MEP_INVALID_ARGUMENT (no such GPU; names the NIC in the filter that does not exist).
 */
MEP_API mep_status_t mep_topology_nic(mep_topology_t *topology, int32_t gpu, const char *filter,
                                      const char **name);

MEP_API void mep_topology_destroy(mep_topology_t *topology);

/* ---- Group ----------------------------------------------------------------------------------- */

/** One rank's membership in a set of ranks that exchange tokens. */
typedef struct mep_group mep_group_t;

/** Meeting point of ranks that are threads of one process. */
typedef struct mep_world mep_world_t;

/**
 * Meeting point of ranks that are processes: address, port and a secret. Copy its bytes to every
 * rank.
 */
typedef struct mep_unique_id {
    uint8_t bytes[MEP_UNIQUE_ID_BYTES];
} mep_unique_id_t;

/**
 * The one primitive that a group needs from its caller: gather `bytes` bytes from each rank into
 * `receive` [R][bytes], ordered by rank. Blocking. Returns 0, or any other number on failure.
 */
typedef int32_t (*mep_all_gather_callback_t)(void *context, const void *send, void *receive,
                                             size_t bytes);

/**
 * What carries rows between ranks that do not reach each other's memory, if the caller has it: send
 * send_bytes[rank] bytes at send[rank] to each rank, and receive receive_bytes[rank] bytes from
 * each at receive[rank], all of them host memory; where a count is 0, nothing. The two sides of a
 * pair agree about its counts, and the calls come in the same order on all ranks; every rank makes
 * them, also one that has nothing for anybody. Blocking. Returns 0, or any other number on failure.
 */
typedef int32_t (*mep_all_to_all_callback_t)(void *context, const void *const *send,
                                             const size_t *send_bytes, void *const *receive,
                                             const size_t *receive_bytes);

/**
 * The same for device memory, in the order of a stream: bytes[rank] bytes at send[rank] to each
 * rank, and as many from it to receive[rank]; where a count is 0, nothing. `stream` is the one of
 * the call (mep_dispatch_args_t); what is queued on it before is to be sent, and what is queued
 * after finds what came. The addresses of a buffer do not change; ranks that are masked are in it,
 * too, as a deadline is not this library's affair here. Returns 0, or any other number on failure.
 */
typedef int32_t (*mep_all_to_all_on_stream_callback_t)(void *context, const void *const *send,
                                                       void *const *receive, const size_t *bytes,
                                                       void *stream);

/**
 * Start listening for the ranks of one group. `address`: IPv4 address or host name of this machine
 * that the other ranks can reach; NULL: 127.0.0.1, so nothing outside this machine can connect. The
 * process that calls this must hold rank 0 of the group. Local. Uses one descriptor until the group
 * is created or mep_unique_id_destroy is called.
 * Errors: MEP_INVALID_ARGUMENT (address unknown), MEP_SYSTEM_ERROR.
 */
MEP_API mep_status_t mep_unique_id_create(const char *address, mep_unique_id_t *id);

/** Stop listening, if no group was created from `id` in this process. Local. */
MEP_API void mep_unique_id_destroy(const mep_unique_id_t *id);

/**
 * A meeting point for `rank_count` threads of this process, each of which creates a group from it.
 * Local. Threads that share a GPU have to let each call end before they queue the next: streams of
 * a process may share a hardware queue, where one rank's call would wait behind another's that
 * waits for it. Processes may share a GPU freely.
 */
MEP_API mep_status_t mep_world_create(int32_t rank_count, mep_world_t **world);
MEP_API void mep_world_destroy(mep_world_t *world);

/**
 * How the ranks find each other is decided by the first of these that is set:
 *   all_gather   the caller's callback;
 *   unique_id    TCP, to the process that made the id;
 *   world        threads of this process;
 *   rank_count 1 nobody to meet;
 *   none         TCP, by the variables that torchrun sets: RANK, WORLD_SIZE, MASTER_ADDR and
 *                MASTER_PORT. Rank 0 listens on MASTER_ADDR at MASTER_PORT +
 *                MOONCAKE_EP_PORT_OFFSET (default 1, because torchrun itself uses MASTER_PORT).
 *                rank and rank_count must be zero or agree with the variables.
 *                MOONCAKE_EP_SECRET, if set, must be the same on all ranks; without it ranks of
 *                other users of a machine are refused there.
 */
typedef struct mep_group_config {
    uint32_t struct_size;
    int32_t rank;       /**< [0, rank_count) */
    int32_t rank_count; /**< R, [1, MEP_RANK_COUNT_MAX] */
    int32_t backend;    /**< MEP_BACKEND_*; 0: CPU */
    int32_t device_id;  /**< of that backend; 0 on the CPU */
    /** 1: reach no peer's memory, as if there were no way to it; also MOONCAKE_EP_DISABLE_P2P=1 */
    int32_t disable_p2p;
    /** of a call of set-up, all its waits together, and of each wait for another rank in rounds
     * (where it can wait for a third: a sixteenth more; rows are due an eighth, weights and sums a
     * sixteenth before, so that who waits in vain is in time with what comes next); 0: 100 s; -1:
     * never */
    int64_t timeout_us;
    mep_all_gather_callback_t all_gather;
    void *all_gather_context; /**< passed to all_gather */
    const mep_unique_id_t *unique_id;
    mep_world_t *world;
    /**
     * For ranks that cannot reach each other's memory; on all ranks or on none. NULL: on GPUs NCCL
     * (MACA: MCCL), if all ranks can load the same version and none share a GPU; otherwise TCP.
     */
    mep_all_to_all_callback_t all_to_all;
    void *all_to_all_context; /**< passed to all_to_all and to all_to_all_on_stream */
    /** On GPUs, instead of all_to_all, which goes through host memory. */
    mep_all_to_all_on_stream_callback_t all_to_all_on_stream;
    /**
     * [R], NULL: all 1. 1 = the rank comes, 0 = there is none of that number now; the same on all
     * ranks. Then R is a capacity: ranks may come later, by mep_group_update. The ranks that come
     * are the ranks of all_gather and of the world, by their order, and the first of them takes the
     * part of rank 0 of unique_id. Not without one of these three.
     */
    const int32_t *active_ranks;
} mep_group_config_t;

typedef struct mep_group_info {
    uint32_t struct_size;
    int32_t rank;
    int32_t rank_count;
    int32_t backend;
    int32_t device_id;
    uint32_t reserved;
    int64_t timeout_us;
} mep_group_info_t;

/** How this rank reaches a peer. */
enum {
    MEP_TRANSPORT_NONE = 0,   /**< not at all: the group can have no buffers */
    MEP_TRANSPORT_SELF = 1,   /**< the rank itself: nothing leaves it */
    MEP_TRANSPORT_THREAD = 2, /**< a thread of this process: the same memory */
    MEP_TRANSPORT_SHM = 3,    /**< a process of this host: POSIX shared memory */
    MEP_TRANSPORT_IPC = 4,    /**< a process of this host: GPU memory by its IPC handle */
    /**
     * no memory of the peer is reached: rows go by the caller's all_to_all or all_to_all_on_stream,
     * by NCCL or by TCP. A half that sends then waits for the peer to send the same; all ranks of
     * the group send their dispatches and combines in the same order. On GPUs the calls of a buffer
     * go to one stream, or to streams that wait for each other; NCCL's, and those of an
     * all_to_all_on_stream that allows it, can be captured in graphs, which must be destroyed
     * before the group; the others, through host memory, wait for the stream, and cannot. Over TCP
     * a peer that is masked in one call is heard no more by this group; over NCCL no far peer is,
     * once one misses a deadline. On GPUs a masked rank still has to make the same calls, unless
     * rows go through host memory.
     */
    MEP_TRANSPORT_COLLECTIVE = 5
};

typedef struct mep_transport_info {
    uint32_t struct_size;
    int32_t kind;       /**< MEP_TRANSPORT_* */
    const char *name;   /**< "none", "self", "thread", "shm", "ipc", "collective" */
    const char *reason; /**< why this one, and why not something faster; the group's */
} mep_transport_info_t;

/**
 * Join a group. Collective, blocking.
 * Before it returns, every rank has stored a word in the memory of every peer that it may reach: a
 * way that does not work shows here, within 10 s, and not in the first dispatch. Ranks that cannot
 * reach each other are no error yet; see mep_group_query_transport.
 * Where a peer fails this call, an update or the creation of a buffer, a thread gives back what the
 * call had of a GPU's memory, soon after it.
 * Errors: MEP_INVALID_ARGUMENT; MEP_UNSUPPORTED (backend not available: on all ranks, as soon as
 * all have come; it is logged before); MEP_TIMEOUT (names the missing ranks); MEP_MISMATCH
 * (rank_count, backend or library version differ); of one rank's environment all hear;
 * MEP_BOOTSTRAP_FAILED (wrong secret, rank taken, connection lost, callback failed);
 * MEP_SYSTEM_ERROR.
 */
MEP_API mep_status_t mep_group_create(const mep_group_config_t *config, mep_group_t **group);

/**
 * Leave the group. Local. Calls on its buffers then fail with MEP_INVALID_STATE; they still have to
 * be destroyed. Peers keep their own mappings, so ranks may leave in any order. Where rows went by
 * NCCL, ranks of a host should leave at the same time: the last of group and buffers to be
 * destroyed waits for the others, for up to 5 s.
 */
MEP_API void mep_group_destroy(mep_group_t *group);

/** Describe this rank. Local. */
MEP_API mep_status_t mep_group_query(const mep_group_t *group, mep_group_info_t *info);

/**
 * Come together anew: the ranks that config->active_ranks names, those that live and those that
 * are to join them. Collective among these, blocking, for config->timeout_us at most; a
 * rank that is new makes, instead, mep_group_create with the same active_ranks, and then the
 * group's buffers again, in the order of their creation: the call of the others returns when the
 * last of them is made. So a process can take the place of one that died, a rank can leave for
 * good, and a group made with fewer ranks than R can grow.
 *
 * config is as for mep_group_create: rank, rank_count, backend and device_id zero or as they were,
 * and a meeting point of its own, as the old one may be lost. Rounds that were sent must have been
 * received. Afterwards all the ranks named are active in the buffers' own masks and the others
 * masked for all calls; ranks have new windows, so what a process that was left out still stores
 * reaches nobody; handles hold no dispatch any more; graphs that were captured before go on, with
 * the new ranks, if rows go through memory (by NCCL they have to be captured again).
 *
 * A rank on which it fails stays as it was before, but for mep_group_all_gather and
 * mep_buffer_create, which need the old meeting point; another update may be tried. If a rank is
 * lost in the last step, the update may have failed on some ranks and not on others, as no message
 * can settle that for all: those do not hear each other then, and the next update brings them
 * together.
 * Errors: those of mep_group_create and mep_buffer_create; MEP_INVALID_STATE (a round is in
 * flight: receive it first); MEP_UNSUPPORTED (a new rank is reached in a way for which the buffers
 * were not made).
 */
MEP_API mep_status_t mep_group_update(mep_group_t *group, const mep_group_config_t *config);

/**
 * Change how long calls wait for another rank, in all buffers of the group: those that bring no
 * timeout of their own, also those that are captured in graphs, and waits that are under way (but
 * for rows that do not go through memory). timeout_us: 0: 100 s; -1: never. Ranks may differ.
 * Local, from any thread; does not wait for the device.
 */
MEP_API mep_status_t mep_group_set_timeout(mep_group_t *group, int64_t timeout_us);

/**
 * Which transport reaches rank `peer`, and why. All ranks compute it from the same facts. Local.
 */
MEP_API mep_status_t mep_group_query_transport(const mep_group_t *group, int32_t peer,
                                               mep_transport_info_t *info);

/**
 * Gather `bytes` host bytes (at most MEP_ALL_GATHER_BYTES_MAX) from each rank into `receive`
 * [R][bytes] (zeros of ranks that are not there), over what the group was created from, or updated
 * last; also a barrier. Collective, blocking. After a
 * failure every further collective call of the group fails; buffers that exist go on.
 * Errors: MEP_INVALID_ARGUMENT, MEP_TIMEOUT, MEP_MISMATCH (bytes differ), MEP_BOOTSTRAP_FAILED.
 */
MEP_API mep_status_t mep_group_all_gather(mep_group_t *group, const void *send, void *receive,
                                          size_t bytes);

/* ---- Buffer ---------------------------------------------------------------------------------- */

/** The memory that a rank shares with its peers for rounds of one shape. */
typedef struct mep_buffer mep_buffer_t;

/** Types that dispatch may carry; bits. */
enum { MEP_PAYLOAD_BF16 = 1, MEP_PAYLOAD_FP16 = 2, MEP_PAYLOAD_FP32 = 4, MEP_PAYLOAD_FP8 = 8 };

typedef struct mep_buffer_config {
    uint32_t struct_size;
    int32_t token_count_max; /**< M, [1, MEP_TOKEN_COUNT_MAX] */
    /** H, a multiple of MEP_HIDDEN_MULTIPLE (with FP8: of MEP_SCALE_GROUP) */
    int32_t hidden;
    int32_t expert_count; /**< E, a multiple of R */
    int32_t topk_max;     /**< most K of a call, [1, MEP_TOPK_MAX] */
    /** MEP_PAYLOAD_* bits; 0: BF16, and FP8 if H allows it. FP32 also lets combine take fp32. */
    uint32_t payload_types;
    /**
     * F: most dispatches, and likewise combines, sent and not yet received; 0: 2. Memory grows with
     * it.
     */
    int32_t rounds_in_flight_max;
    /** 1: combine's partial sums travel as fp32 whatever the type; 0: in the type of x */
    int32_t fp32_partials;
    /**
     * Threads of a CPU rank, this one included; 0: MOONCAKE_EP_CPU_THREADS, else cores per rank of
     * this host, at most 4.
     */
    int32_t cpu_thread_count;
    /**
     * Multiprocessors of a GPU that a launch may fill, at least MEP_SM_COUNT_MIN; 0, or more than
     * there are: all. Ranks may differ. Calls on two buffers that may run at the same time on one
     * GPU wait for peers side by side, so together they have to fit; a buffer of more than 512
     * tokens or 4096 choices counts twice, as its blocks may be spread. Ignored on the CPU.
     */
    int32_t sm_count_max;
} mep_buffer_config_t;

typedef struct mep_buffer_sizes {
    uint32_t struct_size;
    uint32_t reserved;
    /**
     * shared memory of one rank: about 2F * 2 * (R-1) * M * H * element bytes. On GPUs whose links
     * deliver whole lines of memory, a buffer of few tokens takes up to 1/6 more.
     */
    uint64_t window_bytes;
    uint64_t handle_bytes; /**< device memory of one handle */
} mep_buffer_sizes_t;

typedef struct mep_buffer_info {
    uint32_t struct_size;
    int32_t rank;
    int32_t rank_count;
    int32_t token_count_max;
    int32_t hidden;
    int32_t expert_count;
    int32_t local_expert_count;
    int32_t topk_max;
    uint32_t payload_types;
    int32_t rounds_in_flight_max;
    int32_t fp32_partials;
    int32_t cpu_thread_count;
    uint64_t window_bytes;
    uint64_t handle_bytes;
    int32_t sm_count; /**< multiprocessors that a launch may fill; 0 on the CPU */
    uint32_t reserved;
} mep_buffer_info_t;

/** What a buffer has counted since its creation. */
typedef struct mep_buffer_counters {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t dispatches_sent;
    uint64_t combines_sent;
    /** Expert ids other than -1 outside [0, E); each was treated as -1. */
    uint64_t invalid_expert_ids;
    /** Messages and counts from peers that broke a limit and were ignored. */
    uint64_t invalid_messages;
} mep_buffer_counters_t;

/**
 * Memory that mep_buffer_create would take on each rank if all reach each other's. For each peer
 * whose memory is not reached it takes boxes beside that, for sending and on GPUs as many for
 * receiving: M messages, M sums and M*K weights each. Local. Errors: MEP_INVALID_ARGUMENT.
 */
MEP_API mep_status_t mep_buffer_query_sizes(const mep_buffer_config_t *config, int32_t rank_count,
                                            mep_buffer_sizes_t *sizes);

/**
 * Allocate this rank's window and map the peers'. Collective, blocking: on failure it fails on
 * every rank, and nothing is left behind.
 * Errors: MEP_INVALID_ARGUMENT, MEP_UNSUPPORTED (ranks that cannot reach each other: which and why,
 * the same on all ranks), MEP_OUT_OF_MEMORY (also a full /dev/shm), MEP_MISMATCH (configs differ),
 * MEP_TIMEOUT, MEP_BOOTSTRAP_FAILED, MEP_SYSTEM_ERROR, MEP_INVALID_STATE (group left).
 */
MEP_API mep_status_t mep_buffer_create(mep_group_t *group, const mep_buffer_config_t *config,
                                       mep_buffer_t **buffer);

/** Release this rank's memory and mappings. Local. Destroy its handles first. */
MEP_API void mep_buffer_destroy(mep_buffer_t *buffer);

/** The configuration with all defaults filled in. Local. */
MEP_API mep_status_t mep_buffer_query(const mep_buffer_t *buffer, mep_buffer_info_t *info);

/** Read the counters. Local; on a GPU it waits for the device. */
MEP_API mep_status_t mep_buffer_query_counters(const mep_buffer_t *buffer,
                                               mep_buffer_counters_t *counters);

/** What a buffer has counted of one peer, or of its own rank, since its creation. */
typedef struct mep_peer_counters {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t rows_sent;     /**< by dispatch; a token at two experts there is two rows */
    uint64_t rows_received; /**< by dispatch; not those that were lost with a peer */
    /**
     * In microseconds: how long this rank was ready and the peer was not, in dispatch until its
     * counts came and in combine until it began. The rank that all others wait for is a straggler.
     * Not of peers whose rows do not go through memory.
     */
    uint64_t waited_us;
} mep_peer_counters_t;

/**
 * Read them. Local; does not wait for the device, so a call under way may be half counted.
 * Errors: MEP_INVALID_ARGUMENT.
 */
MEP_API mep_status_t mep_buffer_query_peer(const mep_buffer_t *buffer, int32_t peer,
                                           mep_peer_counters_t *counters);

/**
 * Rows that each expert of this rank has received since the buffer's creation: rows[0 .. count),
 * for load balancers. Local; does not wait for the device.
 * Errors: MEP_INVALID_ARGUMENT (count is not L).
 */
MEP_API mep_status_t mep_buffer_query_expert_rows(const mep_buffer_t *buffer, uint64_t *rows,
                                                  int32_t count);

/**
 * The buffer's own mask, for calls with active_ranks NULL: active[0 .. count), 1 = active. Local;
 * does not wait for the device. Errors: MEP_INVALID_ARGUMENT (count is not R).
 */
MEP_API mep_status_t mep_buffer_query_mask(const mep_buffer_t *buffer, int32_t *active,
                                           int32_t count);

/**
 * Change it: mask a rank before it is late, or hear a masked one again. Every rank has a mask of
 * its own, so the others have to be told by other means; a rank that was masked and is to be heard
 * again must have sent as many rounds as the others (mep_group_update settles both). A rank that
 * is not in the group stays masked. Local; calls that are queued already may still use the old one.
 * Errors: MEP_INVALID_ARGUMENT (count is not R, a word is not 0 or 1, or this rank's own is 0).
 */
MEP_API mep_status_t mep_buffer_set_mask(mep_buffer_t *buffer, const int32_t *active,
                                         int32_t count);

/** What a call was waiting for when it masked a peer. */
enum {
    MEP_WAIT_COUNTS = 1,  /**< dispatch: how many tokens the peer sends */
    MEP_WAIT_ROWS = 2,    /**< dispatch: a token */
    MEP_WAIT_WEIGHTS = 3, /**< combine: weights that come with it */
    MEP_WAIT_SUMS = 4,    /**< combine: a sum */
    MEP_WAIT_BEGIN = 5,   /**< combine: that the peer has begun */
    MEP_WAIT_FENCE = 6,   /**< either: that the peer has sent */
    MEP_WAIT_EXCHANGE = 7 /**< either: rows that do not go through memory */
};

/** Why. */
enum {
    /** it missed the deadline, has left this rank out of the round, or its connection was lost */
    MEP_EVENT_LATE = 1,
    MEP_EVENT_LIMIT = 2 /**< what came breaks a limit */
};

/** A peer was masked. */
typedef struct mep_event {
    int32_t peer;
    int32_t phase;  /**< MEP_WAIT_* */
    int32_t reason; /**< MEP_EVENT_* */
    int32_t reserved;
    uint64_t round;    /**< of the buffer's dispatches, or its combines, from 1 on */
    int64_t waited_us; /**< 0 for a limit */
} mep_event_t;

/**
 * Read which peers were masked, and why, by any call on the buffer: the events behind *cursor (0:
 * from the first on), at most `capacity`, and moves *cursor behind them; *count tells how many.
 * The last 64 are kept. Local; does not wait for the device, so it works while a call waits.
 * Errors: MEP_INVALID_ARGUMENT.
 */
MEP_API mep_status_t mep_buffer_read_events(const mep_buffer_t *buffer, uint64_t *cursor,
                                            mep_event_t *events, int32_t capacity, int32_t *count);

/* ---- Handle ---------------------------------------------------------------------------------- */

/**
 * What one dispatch remembers for its combines: its routing, in memory of its own, so it may
 * outlive any number of later rounds (training keeps one per layer until backward). Reusable: a new
 * dispatch overwrites it.
 */
typedef struct mep_handle mep_handle_t;

/**
 * Local, blocking. Errors: MEP_INVALID_ARGUMENT, MEP_OUT_OF_MEMORY, MEP_INVALID_STATE (group left).
 */
MEP_API mep_status_t mep_handle_create(mep_buffer_t *buffer, mep_handle_t **handle);

/**
 * Local. A round of this handle that was sent and not received counts as in flight for ever,
 * because its slot can never be proved free: receive first.
 */
MEP_API void mep_handle_destroy(mep_handle_t *handle);

/* ---- Dispatch and combine -------------------------------------------------------------------- */

/** Which half of a call to do; 0 means both. */
enum { MEP_PHASE_SEND = 1, MEP_PHASE_RECEIVE = 2 };

/** What dispatch does to x before it travels. */
enum {
    MEP_QUANT_NONE = 0,
    /**
     * To float8_e4m3fn with one fp32 scale per MEP_SCALE_GROUP channels of a token: scale =
     * max(max|x|, 1e-4) / 448.
     */
    MEP_QUANT_FP8 = 1,
    /** The same, each scale rounded up to a power of two. */
    MEP_QUANT_FP8_POW2 = 2
};

/**
 * Arguments of mep_dispatch. All tensors are on the group's device. "Row-major" means without gaps,
 * except that rows of x (and of x_scales) may be further apart than their length.
 */
typedef struct mep_dispatch_args {
    uint32_t struct_size;
    uint32_t phases; /**< MEP_PHASE_* bits; 0: both */

    /**
     * [T, H], T in [0, M]: bf16, fp16, fp32, or e4m3fn with x_scales. Must stay unchanged until the
     * receive.
     */
    const mep_tensor_t *x;
    /** fp32 [T, H/128], strides 0 or more; only and always with e4m3fn x */
    const mep_tensor_t *x_scales;
    /**
     * int32 or int64 [T, K] row-major, K in [1, topk_max]: global expert, or -1 for none. An expert
     * named twice by a token gets it once, and its weights add up. Other ids outside [0, E) count
     * as -1 (mep_buffer_counters_t).
     */
    const mep_tensor_t *topk_idx;
    /** fp32 [T, K] row-major, or NULL: given to combine, or plain sums */
    const mep_tensor_t *topk_weights;

    /**
     * [L, R*M, H] row-major; type of x, or e4m3fn with quant. Expert e holds out_count[e] rows:
     * sources in rank order, each one's tokens in their order. The rows after them are left as they
     * were, unless the rows of a rank were lost.
     */
    const mep_tensor_t *out_x;
    /** fp32 [L, R*M, H/128], any positive strides; only and always if out_x is e4m3fn */
    const mep_tensor_t *out_scales;
    const mep_tensor_t *out_count; /**< int32 [L] */
    /** int32 [L, R*M] row-major, or NULL: row -> token index at its source */
    const mep_tensor_t *out_src_info;
    /** int64 [L, R] row-major, or NULL: begin << 32 | count of each source's rows */
    const mep_tensor_t *out_layout_range;

    /**
     * int32 [R or more], or NULL. In: 1 = take part, 0 = neither send to nor wait for that rank
     * (the own rank always takes part). Out: 0 for a rank that missed the deadline. With NULL the
     * buffer keeps such a mask of its own, all ones at first. A rank that was 0 may be 1 again:
     * while it is too many rounds behind, nothing is sent that it has no room for, of which it
     * hears, and masks this rank in that call.
     */
    const mep_tensor_t *active_ranks;

    uint32_t quant; /**< MEP_QUANT_* */
    uint32_t reserved;
    int64_t timeout_us; /**< for this call; 0: the group's; -1: never */
    void *stream;       /**< native stream of the device, NULL: its default; unused on the CPU */
} mep_dispatch_args_t;

/**
 * Send every token to the ranks of its experts, and pack what arrives. Collective, stream-ordered;
 * ranks may have different T (also 0), x may differ in strides, but type, quant and K must be the
 * same on all ranks.
 *
 * In two halves: MEP_PHASE_SEND sends and does not wait; a later call with the same args and
 * MEP_PHASE_RECEIVE waits and packs. At most F rounds may be in between, and a round may only be
 * sent when all but the F-1 rounds before it were received; within that, in any order. All calls on
 * a buffer run one after the other.
 *
 * Errors: MEP_INVALID_ARGUMENT (names the argument, value and rule), MEP_INVALID_STATE (more than F
 * rounds in flight; RECEIVE without SEND; the handle's last round still in flight; group left),
 * MEP_DEVICE_ERROR; where rows do not go through memory also MEP_UNSUPPORTED (a graph that cannot
 * capture that) and MEP_SYSTEM_ERROR or MEP_MISMATCH (what carries them has failed). On the CPU and
 * with active_ranks NULL also MEP_PEER_FAILED: ranks missed the deadline or broke a limit, the
 * outputs hold what the others sent, and those ranks are masked from now on. On GPUs that too,
 * once, if rows that do not go through memory have lost a rank, in this call or one before.
 *
 * Of a rank that is lost before the last of its rows has come, none is counted, nor kept: the
 * outputs are as if it had been masked before.
 */
MEP_API mep_status_t mep_dispatch(mep_buffer_t *buffer, mep_handle_t *handle,
                                  const mep_dispatch_args_t *args);

/** Arguments of mep_combine; conventions as in mep_dispatch_args_t. */
typedef struct mep_combine_args {
    uint32_t struct_size;
    uint32_t phases; /**< MEP_PHASE_* bits; 0: both */

    /**
     * [L, R*M, H] row-major: bf16, fp16, or fp32 (if the buffer carries fp32 partials): the
     * experts' outputs, in the rows that dispatch filled. The others are not read. Must stay
     * unchanged until the receive.
     */
    const mep_tensor_t *x;
    /** fp32 [T, K] row-major, or NULL: those given to dispatch; if there were none, all are 1. */
    const mep_tensor_t *topk_weights;
    /**
     * [T, H] of the type of x; rows may be further apart. T as in the dispatch. A token with no
     * expert becomes 0.
     */
    const mep_tensor_t *out;
    /** as in dispatch; contributions of a masked rank are left out */
    const mep_tensor_t *active_ranks;

    int64_t timeout_us;
    void *stream;
} mep_combine_args_t;

/**
 * Send the experts' outputs back and sum them: out[t] = sum over k of topk_weights[t][k] * expert
 * k's row for t. Each rank sums its experts' rows of a token in fp32 (in the order of k) and sends
 * one row, rounded to the type of x or as fp32 (fp32_partials); the owner sums these in fp32 in
 * rank order and rounds once. The same inputs always give the same bits. Collective, stream-
 * ordered, in two halves like mep_dispatch. A handle may be combined any number of times after its
 * dispatch was received. Whether topk_weights is NULL, and the type of x, must be the same on all
 * ranks. With topk_weights, SEND waits for the peers' weights (which their SEND sends first).
 * Errors: as mep_dispatch; also MEP_INVALID_STATE if the handle holds no received dispatch.
 */
MEP_API mep_status_t mep_combine(mep_buffer_t *buffer, mep_handle_t *handle,
                                 const mep_combine_args_t *args);

#ifdef __cplusplus
}
#endif

#endif /* MOONCAKE_EP_H_ */

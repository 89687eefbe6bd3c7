// The device vocabulary: everything a kernel may say about the hardware.
//
//   Thread, Warp, Block          groups: rank(), size(), sync(), index_in_block(), count_in_block()
//   kWarpSize                    32 on CUDA, 64 on MACA, 1 on the CPU
//   Warp::broadcast(v), from(v, lane)  lane 0's value, or that of any lane
//   Warp::max_over<N>(v)         the largest among N neighbouring lanes (N divides kWarpSize)
//   Warp::repeats(key, bits, first)  whether a lane from `first` to the one below this has the same
//   key
//                                of so many bits
//   Warp::count(v)               on how many lanes v is true, and on how many lower ones
//   Warp::all(v)                 whether v is true on all lanes
//   EP_SHARED(Type, name)        one plain struct that the threads of a block share; once a kernel
//   EP_SHARED_LARGE(Type, name)  the same of more than 48 KB, for launch_large
//   EP_UNROLL, EP_ROLLED         before a loop: its body as often as it runs; only once
//   grid_index<G>, grid_count<G> this group among all of the launch
//   load, store, fetch_add, swap device scope, relaxed: no order, but no race
//   publish(word, v)             all that this thread stored before is visible to whoever observes
//                                v in word, also on another device
//   before_publish<G>()          what any thread of G stored before, counts as stored by all
//   block_any(v)                 whether v is true on any thread of the block; a barrier
//   leave(word, v)               one thread, when its block has stored all that it will, behind
//                                before_publish<Block>(): fetch_add
//   after_leavers(word)          what blocks of the launch stored that have left, as look(word)
//                                or leave(word, v) tells, is there from here on
//   post(word, v), look(word)    a word that stands for nothing but itself, also between devices;
//                                what launches before did is ordered
//   push(at, here, signal, v)    stores a lane's piece of a line (wire/layout.h); `here`: the lane
//                                has one, `signal`: it is the Signal's
//   pull(at, here, signal, ...)  loads several pieces of a lane, all on their way together; true
//   for
//                                the whole warp once the Signals of all their lines are of the
//                                epoch
//   observe<G>(word)             the word's value, and after it all that was published with it
//   after_launches_before()      what the launches before on the stream did is there from here on;
//   each
//                                kernel's first word
//   now_ns, pause(attempt)       for waits that end; a pause grows with the attempts before it
//   clock_is_due(attempt)        whether to ask now_ns after so many: it costs more than a look
//   Pack<n>, kPack               n floats that one lane handles at once, and how many are best;
//                                rows are multiples of kPackMin
//   fetch<T>, widen<T>, narrow<T>  a pack from memory of element type T, as floats, and to memory
//                                (kernels/cast.h); fetch_row: of a row that nobody writes meanwhile
//   add, scaled, max_magnitude   arithmetic of packs, the last over an array of them; no product is
//                                fused with a sum, so that all devices give the same bits
//   fan_out<G, n>                one row read once, n loads of a lane in flight, and written to
//                                several places; all 16-byte aligned; past the caches is a hint
//   kHasBulkCopies               whether a warp can have rows copied through shared memory, past
//   its
//                                registers; slots there, and their bytes: kBulkSlots,
//                                kBulkSlotBytes
//   bulk_open(arrival)           makes a word of shared memory that copies are awaited by
//   bulk_expect(bytes, arrival)  one lane: so many will come, for one bulk_await
//   bulk_fetch(to, from, bytes, arrival)  asks for a copy into shared memory
//   bulk_await(arrival, lap % 2) until all that was expected for the lap has come
//   bulk_put(to, from, bytes, caching)  asks for a copy out of shared memory, past the caches as a
//                                hint; bulk_commit() closes a group
//   bulk_before_put()            each lane, and then Warp::sync(): its stores may be put
//   bulk_await_read<n>()         what this lane's groups but the n newest put has been read
//   bulk_await_written()         and it is there, as if this lane had stored it
//   bulk_after_observe()         what this lane has observed may be fetched
//   pass_store                   16 bytes of a row, which this block does not read again
//   keep_store                   a float whose neighbours in memory are stored later
//   kTermLoads, kPacksAtOnce     loads in flight of a lane that sums rows; packs of a row of them
//   kCastsFp8, cast_fp8          whether there is an instruction for that; its bits are Fp8's
//   kCastsPairs, cast_pair       the same for two floats to bf16 or fp16
//   kRolesApart                  whether the blocks of a launch run beside each other; see Role
//   kFencesPhases                whether launches of SEND and RECEIVE are fenced; see
//                                kernels/fence.h
//   kPacksParcels                whether what an engine carries is packed first; see
//                                kernels/parcels.h
//   kSharedExpertCountMax        experts whose counts fit the memory that a block shares
//   kChoicesCountedByAllMax      choices that each block counts by itself
//   kLineTokenCountMax           tokens of a buffer whose messages may go by line; 0: none
//   kLineChoiceCountMax          choices of all tokens of such a buffer
//   kBlocksOfProcessor           blocks that run beside each other on a multiprocessor
//   sender_block_count_max, receiver_block_count_max  host side: blocks of a launch for each role
//   chunk_count_max              host side: into how many chunks tokens are split for counting
//   kMovingThreads, kSummingThreads  of a block of EP_WIDE_KERNEL, which has a multiprocessor for
//                                itself: for kernels that move rows, and that sum them
//   launch, launch_wide, launch_all  host side: so many blocks; so many wide ones, of so many
//   threads;
//                                blocks that fill the device, for so many items
//   launch_large                 host side: so many blocks, and the bytes of EP_SHARED_LARGE
//   moves_in_bulk(queue)         host side: whether launches may use bulk copies
//   launch_error                 host side: 0, or the error of the launches before
//
// Only this file names vendors. Each header defines every word, in a namespace of its own
// (EP_DEVICE_NAMESPACE), so that one library can hold several devices. A word enters the vocabulary
// only if every device can keep its whole meaning, or can say that it has it not (kHasBulkCopies,
// kLineTokenCountMax): there are no no-op stubs. Grid-wide barriers and named barriers are out:
// order across a grid is the boundary between two kernels, but for leave().
#pragma once

#if defined(EP_DEVICE_CUDA)
#include "device/cuda.h"
#elif defined(EP_DEVICE_MACA)
#include "device/maca.h"
#elif defined(EP_DEVICE_EMU)
#include "device/emu.h"
#else
#include "device/cpu.h"
#endif

// The device vocabulary: everything a kernel may say about the hardware.
//
//   Thread, Warp, Block          groups: rank(), size(), sync(), index_in_block(), count_in_block()
//   kWarpSize                    32 on CUDA, 64 on MACA, 1 on the CPU
//   Warp::broadcast(v)           lane 0's value
//   Warp::max_over<N>(v)         the largest among N neighbouring lanes (N divides kWarpSize)
//   Warp::equals(key)            how many lanes hold the same key, and how many of them are lower
//   Block::all(v)                whether v is true for all threads of the block
//   EP_SHARED(Type, name)        one plain struct that the threads of a block share; once a kernel
//   grid_index<G>, grid_count<G> this group among all of the launch
//   load, store, fetch_add       device scope, relaxed: no order, but no race
//   publish(word, v)             all that this thread stored before is visible to whoever observes
//                                v in word, also on another device
//   publish_all<G>(words, vs, n) the same for n words, and for what any thread of G stored
//   observe<G>(word)             the word's value, and after it all that was published with it
//   now_ns, pause(attempt)       for waits that end; a pause grows with the attempts before it
//   Pack<n>, kPack               n floats that one lane handles at once, and how many are best;
//                                rows are multiples of kPackMin
//   widen<T>, narrow<T>          a pack from and to memory of element type T (kernels/cast.h)
//   add, scaled, max_magnitude   arithmetic of packs, the last over an array of them; no product is
//                                fused with a sum, so that all devices give the same bits
//   fan_out<G>                   one row read once and written to at most kFanOut places; all
//                                16-byte aligned; whether past the caches is a hint
//   kShareCountMax               into how many shares a dispatch's choices are split for counting
//   kOneBlockChoiceCountMax      how many choices one block counts alone
//   kTermsAtOnce                 how many rows a sum should load before it adds
//   launch_one, launch_all       host side: one block; blocks that fill the device, for so many
//                                items
//   launch_error                 host side: 0, or the error of the launches before
//
// Only this file names vendors. Each header defines every word, in a namespace of its own
// (EP_DEVICE_NAMESPACE), so that one library can hold several devices. A word enters the vocabulary
// only if every device can keep its whole meaning: there are no no-op stubs. Grid-wide barriers,
// bulk copies and named barriers are out: order across a grid is the boundary between two kernels.
#pragma once

#if defined(EP_DEVICE_CUDA)
#include "device/cuda.h"
#elif defined(EP_DEVICE_EMU)
#include "device/emu.h"
#else
#include "device/cpu.h"
#endif

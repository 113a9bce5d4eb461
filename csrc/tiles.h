// How the CUDA kernels are cut, in one place; Triton's are in kernels/tiles.py. Noise never depends on these numbers, the order of a sum does.
#pragma once

namespace fastscore {

constexpr int kThreads = 256;      // of a block that sums, or goes element by element
constexpr int kPackThreads = 128;  // of a block of whole packs
constexpr int kPacks = 4;          // of a thread: 16 elements, 32 of a 16-bit type
constexpr int kSignTile = 32 * 128;   // signs of a warp: each lane computes the Philox block of 128

// Packs of a thread that are on their way at once in a sum: 64 bytes.
template <class T> constexpr int kInFlight = sizeof(T) == 8 ? 2 : 4;

// Elements of a sample that one thread, or one warp, sums; more take a block. Partial sums that one warp adds; more take a block.
constexpr int kOfThread = 16, kOfWarp = 2048, kSplitsOfWarp = 256;

}  // namespace fastscore

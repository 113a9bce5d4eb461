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

// Norms in clusters: pixels that a warp takes at once; blocks that every device puts in a cluster; bytes of shared memory that leave room
// for three blocks in a multiprocessor of 228 KB, so that one reads while another writes, and that a block can have; pixels of a channel
// below which warps would be mostly idle, and elements of a row that one program of Triton's keeps in its registers.
constexpr int64_t kPiece = 1024, kMostBlocks = 8, kGoodShared = 74 * 1024, kMostShared = 227 * 1024;
constexpr int64_t kLeastOfChannel = 256, kOfOneProgram = 16384;

}  // namespace fastscore

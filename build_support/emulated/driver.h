// A GPU on the host: threads are fibers, which take turns at barriers and shuffles; blocks, or clusters of them, run one after the other.
//
// Every access of device code is looked at (the compiler calls __asan_load4_noabort and the like): it must lie in a tensor of the call, be
// aligned, and not race with another thread. The first fault ends the kernel and is the launch's error. Two devices, of two streams each.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace on_host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Size {
  unsigned x, y, z;
  Size(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  Size(int x) : Size(static_cast<unsigned>(x)) {}
};

extern Index thread_index, block_index;
extern Size block_size, grid_size;
extern float approximation;   // of the error that is documented for the hardware's approximations: -1, 0 or 1 times its bound

struct Launch {
  const char* kernel;
  Size grid, block;
  size_t shared;
  void* stream;
  unsigned bound;                   // of __launch_bounds__, 0: none
  void (*run)(const void*);         // calls the kernel with its arguments
  std::shared_ptr<void> arguments;
  size_t argument_bytes;
  const void* function;             // the kernel
  unsigned cluster = 1;             // blocks that run together, along x
};

void launch(const Launch&);   // runs it, or keeps it where the stream is captured

// What device code calls.
enum class Meeting { kShuffle, kBallot, kBarrier };
uint64_t meet_warp(Meeting, int site, unsigned mask, uint64_t value, unsigned source);
int meet_block(int site, int predicate);   // how many threads had a predicate that is not 0
void* shared_memory(const void* declaration, size_t bytes, size_t alignment);
void* dynamic_shared_memory();
void meet_cluster(int site);
unsigned rank_in_cluster(), size_of_cluster();
void* of_rank(const void*, unsigned rank);
void unchecked(bool);   // from here on accesses may race: atomics

// What launchers call.
int32_t set_device(int32_t);   // the one before
void call_begins(), call_ends(const char** fault);
void may_access(const void* begin, size_t bytes);
void may_write(const void* begin);
int32_t device_of(const void*);
void fresh(const void* begin, size_t bytes, std::shared_ptr<void> owner);   // a temporary, which a captured graph keeps
int ask_for_shared_memory(const void* kernel, size_t bytes);             // more than every launch may have
int clusters_at_once(const void* kernel, size_t bytes, unsigned size);   // that the device can run
int take_error();
const char* describe(int error);
void fail(int error, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace on_host

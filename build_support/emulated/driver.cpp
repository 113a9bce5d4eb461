#include "driver.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace on_host {

Index thread_index, block_index;
Size block_size, grid_size;
float approximation = 0;

namespace {

// Faults: the first one is kept until somebody asks for it.
enum Error { kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidStream = 400, kIllegalAddress = 700, kMisaligned = 716, kFailure = 719 };
int pending = 0;
std::string message;

// Threads. A fiber runs one thread after the other until one of them has to wait.
constexpr size_t kStack = 64 * 1024, kMostThreads = 1024, kShared = 227 * 1024, kWithoutAsking = 48 * 1024;
constexpr unsigned kMostBlocks = 8;   // of a cluster that every device takes
enum State { kNew, kReady, kAtWarp, kAtBlock, kAtCluster, kEnded };

struct Fiber {
  ucontext_t context;
  char* stack;
  bool begun = false;
};

struct Thread {
  State state;
  Fiber* fiber;
  Meeting meeting;
  int site;
  unsigned mask, source;
  uint64_t value, result;
  unsigned warp_meetings;   // barriers of its warp that it has passed
};

// What is known of two bytes of memory: who wrote and who read them last, and between which barriers.
struct Touched {
  uint64_t writer = 0, reader = 0;   // 1 + the thread in its grid; 0: nobody
  unsigned written = 0, read = 0;    // the block's barriers before
  unsigned written_warp = 0, read_warp = 0;
  unsigned written_cluster = 0, read_cluster = 0;
  bool many = false;                 // several readers since
};

struct Range {
  uintptr_t begin, end;
  int device;
  bool writable;
  std::vector<Touched> touched;   // empty where the range is long
};

constexpr size_t kWatched = 1 << 20;   // bytes of a tensor in which races are looked for
constexpr int kDevices = 2, kStreams = 2;

struct Stream {
  int device, number;
};
Stream streams[kDevices][kStreams] = {{{0, 0}, {0, 1}}, {{1, 0}, {1, 1}}};
int current_stream[kDevices] = {0, 0}, current_device = 0;
bool capturing = false;

struct Captured {
  Launch launch;
  std::vector<Range> ranges;
};
std::vector<Captured> captured;
std::vector<std::shared_ptr<void>> temporaries;   // of captured graphs
std::map<uintptr_t, std::pair<uintptr_t, int>> placed;   // begin: (end, device)

std::recursive_mutex one_at_a_time;
bool in_call = false, in_kernel = false, racing_allowed = false;
std::vector<Range> ranges;
std::string log;
long launches = 0, accesses = 0;
int order = 0;   // of threads and blocks: 0 as they are numbered, 1 the other way round

std::vector<Fiber> fibers;
std::vector<Fiber*> idle;
std::vector<Thread> threads;
Fiber* running = nullptr;
ucontext_t scheduler;
bool aborted = false;
const Launch* current = nullptr;
unsigned next_new = 0;
uint64_t first_block = 0;    // of the cluster, in the grid
unsigned me = 0;             // the running thread, in the cluster
unsigned of_block = 1;       // threads of a block

// A block of the cluster that runs. Its arrays of shared memory lie at the same places as those of the others.
struct Block {
  unsigned barriers = 0;
  int met = 0;                     // threads with a predicate at the last barrier
  bool visited = false;            // by another block's thread, since the cluster's last barrier
  std::vector<Touched> touched;    // its shared memory
};
Block cluster[kMostBlocks];
unsigned blocks_of_cluster = 1, cluster_barriers = 0;

alignas(128) char shared_arena[kMostBlocks][kShared];
std::map<const void*, size_t> shared_at;
size_t shared_used = 0;
std::map<const void*, size_t> asked_for;   // by kernel: bytes of shared memory that its launches may have
int most_clusters = 16;                    // that the device says it holds at once
long questions = 0;                        // how often it was asked

[[noreturn]] void abandon() {
  aborted = true;
  setcontext(&scheduler);
  __builtin_unreachable();
}

void fault(int error, const char* format, ...) __attribute__((format(printf, 2, 3)));
void fault(int error, const char* format, ...) {
  if (pending == 0) {
    char text[600];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    pending = error, message = text;
    if (in_kernel) {
      std::snprintf(text, sizeof text, " (%s, block %u %u %u, thread %u)", current->kernel, block_index.x, block_index.y, block_index.z, me % of_block);
      message += text;
    }
  }
  if (in_kernel) abandon();
}

void place_thread(unsigned i) {
  me = i;
  const unsigned t = i % of_block;
  thread_index.x = t % block_size.x, thread_index.y = t / block_size.x % block_size.y, thread_index.z = t / (block_size.x * block_size.y);
  const uint64_t b = first_block + i / of_block;
  block_index = {static_cast<unsigned>(b % grid_size.x), static_cast<unsigned>(b / grid_size.x % grid_size.y),
                 static_cast<unsigned>(b / grid_size.x / grid_size.y)};
}

unsigned nth(unsigned i, unsigned n) { return order == 0 ? i : n - 1 - i; }

void fiber_main() {
  while (true) {
    while (next_new < threads.size()) {
      const unsigned i = nth(next_new++, threads.size());
      place_thread(i);
      threads[i].fiber = running;
      current->run(current->arguments.get());
      threads[me].state = kEnded;
    }
    Fiber* self = running;
    idle.push_back(self);
    swapcontext(&self->context, &scheduler);
  }
}

void enter(Fiber* fiber) {
  running = fiber;
  if (!fiber->begun) {
    fiber->begun = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
  }
  swapcontext(&scheduler, &fiber->context);
}

void wait(State state) {
  Thread& t = threads[me];
  t.state = state;
  Fiber* self = running;
  const unsigned i = me;
  swapcontext(&self->context, &scheduler);
  place_thread(i);
}

void make_fibers() {
  if (fibers.empty()) {
    constexpr size_t most = kMostThreads * kMostBlocks;
    fibers.resize(most);
    char* stacks = static_cast<char*>(mmap(nullptr, kStack * most, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < most; ++i) fibers[i].stack = stacks + i * kStack;
  }
  idle.clear();
  for (auto fiber = fibers.rbegin(); fiber != fibers.rend(); ++fiber) idle.push_back(&*fiber);
}

// The threads of a mask that meet at one place go on together; true if some do.
bool release_warps(unsigned block) {
  bool released = false;
  const unsigned end = (block + 1) * of_block;
  for (unsigned first = block * of_block; first < end; first += 32) {
    const unsigned lanes = std::min(32u, end - first);
    for (unsigned i = 0; i < lanes; ++i) {
      Thread& t = threads[first + i];
      if (t.state != kAtWarp) continue;
      bool all = true;
      for (unsigned k = 0; k < 32 && all; ++k) {
        if (!(t.mask >> k & 1)) continue;
        const Thread* other = k < lanes ? &threads[first + k] : nullptr;
        if (!other || other->state == kEnded) {
          fault(kFailure, "lane %u of a warp's mask %08x has ended or does not exist (line %d)", k, t.mask, t.site);
          return false;
        }
        all = other->state == kAtWarp && other->site == t.site && other->mask == t.mask;
      }
      if (!all) continue;
      if (!(t.mask >> i & 1)) {
        fault(kFailure, "lane %u is not in its own mask %08x (line %d)", i, t.mask, t.site);
        return false;
      }
      const unsigned mask = t.mask;
      uint64_t ballot = 0;
      for (unsigned k = 0; k < lanes; ++k)
        if (mask >> k & 1) ballot |= static_cast<uint64_t>(threads[first + k].value != 0) << k;
      for (unsigned k = 0; k < lanes; ++k) {
        if (!(mask >> k & 1)) continue;
        Thread& other = threads[first + k];
        if (other.meeting == Meeting::kShuffle && !(mask >> other.source & 1)) {
          fault(kFailure, "lane %u reads lane %u, which is not in the mask %08x (line %d)", k, other.source, mask, other.site);
          return false;
        }
        other.result = other.meeting == Meeting::kShuffle ? threads[first + other.source].value : ballot;
      }
      for (unsigned k = 0; k < lanes; ++k) {
        if (!(mask >> k & 1)) continue;
        threads[first + k].state = kReady;
        threads[first + k].warp_meetings += threads[first + k].meeting == Meeting::kBarrier;
      }
      released = true;
    }
  }
  return released;
}

bool all_at(const Thread* first, size_t n, State state) {
  return std::all_of(first, first + n, [&](const Thread& t) { return t.state == state && t.site == first->site; });
}

bool release_block(unsigned block) {
  Thread* first = &threads[block * of_block];
  if (!all_at(first, of_block, kAtBlock)) return false;
  cluster[block].met = 0;
  for (Thread* t = first; t < first + of_block; ++t) {
    cluster[block].met += t->value != 0;
    t->state = kReady;
  }
  ++cluster[block].barriers;
  return true;
}

bool release_cluster() {
  if (!all_at(threads.data(), threads.size(), kAtCluster)) return false;
  for (Thread& t : threads) t.state = kReady;
  for (Block& block : cluster) ++block.barriers, block.visited = false;
  ++cluster_barriers;
  return true;
}

bool release() {
  bool released = false;
  for (unsigned block = 0; block < blocks_of_cluster && pending == 0; ++block) released |= release_warps(block);
  if (released || pending) return pending == 0;
  for (unsigned block = 0; block < blocks_of_cluster; ++block) released |= release_block(block);
  return released || release_cluster();
}

// Nobody can go on: why.
void stuck() {
  for (unsigned block = 0; block < blocks_of_cluster; ++block) {
    const Thread* first = &threads[block * of_block];
    const Thread* waiting =
        std::find_if(first, first + of_block, [](const Thread& t) { return t.state == kAtBlock || t.state == kAtWarp; });
    if (waiting == first + of_block) continue;
    for (const Thread* t = first; t < first + of_block; ++t) {
      if (t->state == kEnded) return fault(kFailure, "a thread ended while others wait at a barrier of the block");
      if (t->state != waiting->state || t->site != waiting->site)
        return fault(kFailure, "threads of a block wait at different barriers (lines %d and %d)", waiting->site, t->site);
    }
  }
  for (const Thread& t : threads)
    if (t.state == kEnded) return fault(kFailure, "a thread ended while others wait at a barrier of the cluster");
  fault(kFailure, "threads of a cluster wait at different barriers");
}

// Whether every thread has run to its end.
bool run_threads() {
  while (!aborted) {
    while (next_new < threads.size() && !aborted) {
      Fiber* fiber = idle.back();
      idle.pop_back();
      enter(fiber);
    }
    bool waiting = false;
    for (unsigned i = 0; i < threads.size() && !aborted; ++i) {
      Thread& t = threads[nth(i, threads.size())];
      if (t.state == kReady) {
        place_thread(nth(i, threads.size()));
        enter(t.fiber);
      }
      waiting |= t.state == kReady;
    }
    if (aborted || waiting) continue;
    if (std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.state == kEnded; })) return true;
    in_kernel = false;   // a fault here has no thread to leave
    const bool released = release();
    if (!released && pending == 0) stuck();
    in_kernel = true;
    if (!released) return false;
  }
  return false;
}

void run_cluster() {
  // Not a number, until it is written.
  for (unsigned b = 0; b < blocks_of_cluster; ++b) {
    std::memset(shared_arena[b], 0xff, std::max<size_t>(shared_used, current->shared));
    std::fill(cluster[b].touched.begin(), cluster[b].touched.end(), Touched{});
    cluster[b].barriers = 0, cluster[b].visited = false;
  }
  shared_at.clear();
  shared_used = current->shared;
  for (Thread& t : threads) t = {kNew, nullptr, Meeting::kBarrier, 0, 0, 0, 0, 0, 0};
  next_new = 0, cluster_barriers = 0;
  if (!run_threads()) return;

  in_kernel = false;
  for (const Block& block : cluster)
    if (block.visited) fault(kFailure, "the shared memory of a block is accessed by another with no barrier of the cluster behind: it may have ended");
  in_kernel = true;
}

void run(const Launch& l) {
  current = &l;
  block_size = l.block, grid_size = l.grid;
  of_block = l.block.x * l.block.y * l.block.z, blocks_of_cluster = l.cluster;
  threads.resize(of_block * blocks_of_cluster);
  make_fibers();
  for (unsigned b = 0; b < blocks_of_cluster; ++b) cluster[b].touched.resize(kShared / 2);
  for (Range& range : ranges) range.touched.assign(range.end - range.begin <= kWatched ? (range.end - range.begin) / 2 + 1 : 0, Touched{});
  in_kernel = true, aborted = false;
  const uint64_t blocks = static_cast<uint64_t>(l.grid.x) * l.grid.y * l.grid.z;
  for (uint64_t next = 0; next < blocks && pending == 0; next += blocks_of_cluster) {
    first_block = order == 0 ? next : blocks - blocks_of_cluster - next;
    run_cluster();
  }
  if (pending) {   // fibers stand in the middle of the kernel
    for (Fiber& fiber : fibers) fiber.begun = false;
  }
  in_kernel = false, racing_allowed = false;
}

bool same_moment(uint64_t other, unsigned then, unsigned then_warp, unsigned then_cluster) {
  const uint64_t thread = other - 1, block = thread / of_block;
  if (block < first_block || block >= first_block + blocks_of_cluster) return true;   // another cluster: nothing orders the two
  const unsigned mine = me / of_block;
  if (block - first_block != mine) return then_cluster == cluster_barriers;
  if (thread % of_block / 32 == me % of_block / 32) return then == cluster[mine].barriers && then_warp == threads[me].warp_meetings;
  return then == cluster[mine].barriers;
}

void race(const char* first, const char* second, uint64_t other) {
  const uint64_t i = other - 1;
  fault(kFailure, "a race: thread %d of block %d %s what this thread %s, with no barrier between", static_cast<int>(i % of_block),
        static_cast<int>(i / of_block), first, second);
}

void touch(Touched* begin, Touched* end, bool write) {
  const uint64_t self = first_block * of_block + me + 1;
  const unsigned warp = threads[me].warp_meetings, before = cluster[me / of_block].barriers;
  for (Touched* t = begin; t < end; ++t) {
    if (t->writer && t->writer != self && same_moment(t->writer, t->written, t->written_warp, t->written_cluster))
      race("wrote", write ? "writes" : "reads", t->writer);
    const bool lately = t->reader && same_moment(t->reader, t->read, t->read_warp, t->read_cluster);
    if (write) {
      if (lately && (t->reader != self || t->many)) race("(or another) read", "writes", t->reader);
      t->writer = self, t->written = before, t->written_warp = warp, t->written_cluster = cluster_barriers;
    } else {
      t->many = lately && (t->many || t->reader != self);
      t->reader = self, t->read = before, t->read_warp = warp, t->read_cluster = cluster_barriers;
    }
  }
}

extern "C" const char __ehdr_start __attribute__((visibility("hidden")));
extern "C" const char _end __attribute__((visibility("hidden")));

bool inside(uintptr_t at, size_t size, const void* begin, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  return at >= first && at + size <= first + bytes;
}

void access(uintptr_t at, size_t size, bool write) {
  if (!in_kernel) {
    if (!in_call) return;
    for (const Range& range : ranges)
      if (at < range.end && at + size > range.begin) fault(kInvalidValue, "the launcher itself %s memory of the device", write ? "writes" : "reads");
    return;
  }
  if (inside(at, size, running->stack, kStack)) return;
  ++accesses;
  for (Range& range : ranges) {
    if (at + size <= range.begin || at >= range.end) continue;
    if (at < range.begin || at + size > range.end) fault(kIllegalAddress, "%zu bytes that begin or end outside a tensor are %s", size, write ? "written" : "read");
    if (range.device != current_device) fault(kIllegalAddress, "device %d accesses memory of device %d", current_device, range.device);
    if (write && !range.writable) fault(kIllegalAddress, "an input of the operator is written");
    if (!range.touched.empty() && !racing_allowed) {
      const size_t first = (at - range.begin) / 2;
      touch(&range.touched[first], &range.touched[first] + std::max<size_t>(1, size / 2), write);
    }
    return;
  }
  if (inside(at, size, shared_arena, sizeof shared_arena)) {
    const size_t within = at - reinterpret_cast<uintptr_t>(shared_arena), owner = within / kShared, first = within % kShared / 2;
    if (owner >= blocks_of_cluster || within % kShared + size > shared_used)
      fault(kIllegalAddress, "shared memory beyond what the block has is accessed");
    Block& block = cluster[owner];
    block.visited |= owner != me / of_block;
    if (!racing_allowed) touch(&block.touched[first], &block.touched[first] + std::max<size_t>(1, size / 2), write);
    return;
  }
  if (!write && inside(at, size, current->arguments.get(), current->argument_bytes)) return;
  if (!write && inside(at, size, &__ehdr_start, &_end - &__ehdr_start)) return;   // constants
  fault(kIllegalAddress, "an address is %s that lies in no tensor of the call", write ? "written" : "read");
}

}  // namespace

void fail(int error, const char* format, ...) {
  char text[500];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  fault(error, "%s", text);
}

bool stubbed = false;

void launch(const Launch& l) {
  if (stubbed) return;
  if (pending) return;
  const uint64_t threads_of_block = static_cast<uint64_t>(l.block.x) * l.block.y * l.block.z;
  if (l.grid.x == 0 || l.grid.x > 0x7fffffffu || l.grid.y == 0 || l.grid.y > 65535 || l.grid.z == 0 || l.grid.z > 65535)
    return fault(kInvalidConfiguration, "%s: a grid of %u x %u x %u blocks", l.kernel, l.grid.x, l.grid.y, l.grid.z);
  if (threads_of_block == 0 || threads_of_block > kMostThreads)
    return fault(kInvalidConfiguration, "%s: %d threads in a block", l.kernel, static_cast<int>(threads_of_block));
  if (l.bound && threads_of_block > l.bound)
    return fault(kInvalidConfiguration, "%s: %d threads in a block, its bounds are %u", l.kernel, static_cast<int>(threads_of_block), l.bound);
  const auto asked = asked_for.find(l.function);
  if (l.shared > (asked == asked_for.end() ? kWithoutAsking : asked->second))
    return fault(kInvalidConfiguration, "%s: %zu bytes of shared memory", l.kernel, l.shared);
  if (l.cluster == 0 || l.cluster > kMostBlocks || l.grid.x % l.cluster)
    return fault(kInvalidConfiguration, "%s: clusters of %u in a grid of %u blocks", l.kernel, l.cluster, l.grid.x);
  const Stream* stream = static_cast<const Stream*>(l.stream);
  if (!stream) return fault(kInvalidStream, "%s: a launch without torch's current stream", l.kernel);
  if (stream->device != current_device)
    return fault(kInvalidStream, "%s: a stream of device %d while device %d is current", l.kernel, stream->device, current_device);
  ++launches;
  char line[300];
  std::snprintf(line, sizeof line, "%s %u %u %d %d\n", l.kernel, l.grid.x, l.block.x, stream->device, stream->number);
  log += line;
  if (capturing) captured.push_back({l, ranges});
  else run(l);
}

uint64_t meet_warp(Meeting meeting, int site, unsigned mask, uint64_t value, unsigned source) {
  Thread& t = threads[me];
  t.meeting = meeting, t.site = site, t.mask = mask, t.value = value, t.source = source;
  wait(kAtWarp);
  return threads[me].result;
}

int meet_block(int site, int predicate) {
  threads[me].site = site, threads[me].value = predicate != 0;
  wait(kAtBlock);
  return cluster[me / of_block].met;
}

void meet_cluster(int site) {
  threads[me].site = site;
  wait(kAtCluster);
}

unsigned rank_in_cluster() { return me / of_block; }
unsigned size_of_cluster() { return blocks_of_cluster; }

// Where what lies at p, in this block's shared memory, lies in that of another.
void* of_rank(const void* p, unsigned rank) {
  const uintptr_t within = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(shared_arena[me / of_block]);
  if (within >= kShared) fault(kIllegalAddress, "an address of another block's shared memory is asked for that is none of this block's");
  if (rank >= blocks_of_cluster) fault(kIllegalAddress, "there is no block %u in a cluster of %u", rank, blocks_of_cluster);
  return shared_arena[rank] + within;
}

int ask_for_shared_memory(const void* kernel, size_t bytes) {
  if (bytes > kShared) return kInvalidValue;
  asked_for[kernel] = bytes;
  return 0;
}

int clusters_at_once(const void* kernel, size_t bytes, unsigned size) {
  ++questions;
  const auto asked = asked_for.find(kernel);
  const bool fits = bytes <= (asked == asked_for.end() ? kWithoutAsking : asked->second) && size <= kMostBlocks;
  return fits ? most_clusters : 0;
}

void* shared_memory(const void* declaration, size_t bytes, size_t alignment) {
  auto found = shared_at.find(declaration);
  if (found == shared_at.end()) {
    const size_t at = (shared_used + alignment - 1) / alignment * alignment;
    if (at + bytes > 48 * 1024 + current->shared) fault(kInvalidConfiguration, "%zu bytes of shared memory", at + bytes);
    for (unsigned b = 0; b < blocks_of_cluster; ++b) std::memset(shared_arena[b] + at, 0xff, bytes);
    shared_used = at + bytes;
    found = shared_at.emplace(declaration, at).first;
  }
  return shared_arena[me / of_block] + found->second;
}

void* dynamic_shared_memory() { return shared_arena[me / of_block]; }

void unchecked(bool racing) { racing_allowed = racing; }

int32_t set_device(int32_t device) {
  const int before = current_device;
  if (device < 0 || device >= kDevices) fault(kInvalidValue, "there is no device %d", device);
  else current_device = device;
  return before;
}

void call_begins() {
  one_at_a_time.lock();
  ranges.clear();
  pending = 0;
  in_call = true;
}

void call_ends(const char** fault) {
  static std::string kept;
  kept = message;
  *fault = pending ? kept.c_str() : nullptr;
  pending = 0, in_call = false;
  ranges.clear();
  one_at_a_time.unlock();
}

void may_access(const void* begin, size_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  for (Range& range : ranges) {   // the same memory twice, as where a state is updated in place
    if (first + bytes <= range.begin || first >= range.end) continue;
    range.begin = std::min(range.begin, first), range.end = std::max(range.end, first + bytes);
    return;
  }
  ranges.push_back({first, first + bytes, device_of(begin), false, {}});
}

void may_write(const void* begin) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  for (Range& range : ranges)
    if (at >= range.begin && at < range.end) range.writable = true;
}

int32_t device_of(const void* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  auto found = placed.upper_bound(at);
  if (found == placed.begin()) return 0;
  --found;
  return at < found->second.first ? found->second.second : 0;
}

void fresh(const void* begin, size_t bytes, std::shared_ptr<void> owner) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  ranges.push_back({first, first + bytes, current_device, false, {}});
  if (capturing) temporaries.push_back(owner);
}

int take_error() {
  const int error = pending;
  pending = 0;
  return error;
}

const char* describe(int) { return message.c_str(); }

}  // namespace on_host

using namespace on_host;

// What the compiler calls before each access (-fsanitize=kernel-address) and where something is undefined (-fsanitize=alignment ...).
#define ACCESS(n)                                                                    \
  extern "C" void __asan_load##n##_noabort(uintptr_t at) { access(at, n, false); }   \
  extern "C" void __asan_store##n##_noabort(uintptr_t at) { access(at, n, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
extern "C" void __asan_loadN_noabort(uintptr_t at, size_t size) { access(at, size, false); }
extern "C" void __asan_storeN_noabort(uintptr_t at, size_t size) { access(at, size, true); }
extern "C" void __asan_handle_no_return() {}
extern "C" void __asan_before_dynamic_init(const char*) {}
extern "C" void __asan_after_dynamic_init() {}

struct Place { const char* file; uint32_t line, column; };
static void undefined(const Place* place, int error, const char* what) {
  if (!in_kernel) return;
  const char* file = std::strrchr(place->file, '/');
  fault(error, "%s at %s:%u", what, file ? file + 1 : place->file, place->line);
}
extern "C" void __ubsan_handle_type_mismatch_v1(const Place* place, uintptr_t) { undefined(place, kMisaligned, "a misaligned address"); }
extern "C" void __ubsan_handle_out_of_bounds(const Place* place, uintptr_t) { undefined(place, kFailure, "an index beyond an array"); }
extern "C" void __ubsan_handle_shift_out_of_bounds(const Place* place, uintptr_t, uintptr_t) { undefined(place, kFailure, "a shift by too much"); }
extern "C" void __ubsan_handle_add_overflow(const Place* place, uintptr_t, uintptr_t) { undefined(place, kFailure, "a sum that overflows"); }
extern "C" void __ubsan_handle_sub_overflow(const Place* place, uintptr_t, uintptr_t) { undefined(place, kFailure, "a difference that overflows"); }
extern "C" void __ubsan_handle_mul_overflow(const Place* place, uintptr_t, uintptr_t) { undefined(place, kFailure, "a product that overflows"); }
extern "C" void __ubsan_handle_negate_overflow(const Place* place, uintptr_t) { undefined(place, kFailure, "a negation that overflows"); }
extern "C" void __ubsan_handle_divrem_overflow(const Place* place, uintptr_t, uintptr_t) { undefined(place, kFailure, "a division that overflows"); }

// As libtorch_cuda's, for csrc/cuda_stream.h.
EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  if (device < 0 || device >= kDevices) return 1;
  *stream = &streams[device][current_stream[device]];
  return 0;
}

// For build_support/emulate.py.
EXPORT void emulated_order(int which) { order = which; }
EXPORT void emulated_approximation(float sign) { approximation = sign; }
EXPORT void emulated_place(void* begin, size_t bytes, int device) {
  if (device == 0) placed.erase(reinterpret_cast<uintptr_t>(begin));
  else placed[reinterpret_cast<uintptr_t>(begin)] = {reinterpret_cast<uintptr_t>(begin) + bytes, device};
}
EXPORT void emulated_clusters(int most) { most_clusters = most; }
EXPORT long emulated_questions() { return questions; }
EXPORT void emulated_use_stream(int device, int number) { current_stream[device] = number; }
EXPORT int emulated_current_device() { return current_device; }
EXPORT const char* emulated_log() { return log.c_str(); }
EXPORT void emulated_clear_log() { log.clear(); }
EXPORT long emulated_accesses() { return accesses; }
EXPORT void emulated_stub(int on) { stubbed = on != 0; }   // launches that run nothing, to time what the host does around them
EXPORT void emulated_capture(int on) { capturing = on != 0; }
EXPORT long emulated_captured() { return static_cast<long>(captured.size()); }
EXPORT const char* emulated_replay(long begin, long end) {
  const std::lock_guard<std::recursive_mutex> lock(one_at_a_time);
  pending = 0;
  for (long i = begin; i < end && pending == 0; ++i) {
    const int before = set_device(static_cast<const Stream*>(captured[i].launch.stream)->device);
    ranges = captured[i].ranges;
    run(captured[i].launch);
    set_device(before);
  }
  ranges.clear();
  const bool failed = pending != 0;
  pending = 0;
  return failed ? message.c_str() : nullptr;
}

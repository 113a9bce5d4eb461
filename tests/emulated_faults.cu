// Kernels with one mistake each, which the emulated device must name; and some without.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstring>

namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads) right(float* out, int n) {
  __shared__ float warps[kThreads / 32];
  float v = static_cast<float>(threadIdx.x);
#pragma unroll
  for (int k = 16; k > 0; k /= 2) v += __shfl_down_sync(0xffffffffu, v, k);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  const unsigned even = __ballot_sync(0xffffffffu, threadIdx.x % 2 == 0);
  const int n_small = __syncthreads_count(threadIdx.x < 10);
  if (threadIdx.x == 0) out[blockIdx.x] = warps[0] + warps[1] + (even == 0x55555555u) + n_small;
  atomicAdd(out + n - 1, 1.0f);
}

__global__ void no_barrier(float* out, int) {
  __shared__ float v[kThreads];
  v[threadIdx.x] = 1;
  out[threadIdx.x] = v[kThreads - 1 - threadIdx.x];
}

__global__ void one_barrier_of_two(float* out, int) {
  __shared__ float v[kThreads];
  v[threadIdx.x] = 1;
  __syncthreads();
  const float other = v[kThreads - 1 - threadIdx.x];
  v[threadIdx.x] = 2 * other;   // somebody may not have read it yet
  out[threadIdx.x] = other;
}

__global__ void no_warp_barrier(float* out, int) {
  __shared__ float v[32];
  if (threadIdx.x >= 32) return;
  v[threadIdx.x] = 1;
  out[threadIdx.x] = v[31 - threadIdx.x];
}

__global__ void warp_barrier(float* out, int) {
  __shared__ float v[32];
  if (threadIdx.x >= 32) return;
  v[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = v[31 - threadIdx.x];
}

__global__ void never_written(float* out, int) {
  __shared__ float v[kThreads];
  out[threadIdx.x] = v[threadIdx.x];
}

__global__ void beyond(float* out, int n) { out[n + threadIdx.x] = 1; }
__global__ void partly_beyond(float* out, int n) { reinterpret_cast<uint4*>(out)[(n + 3) / 4 - 1] = make_uint4(0, 0, 0, 0); }
__global__ void misaligned(float* out, int) { reinterpret_cast<uint4*>(out + 1)[0] = make_uint4(0, 0, 0, 0); }
__global__ void two_write(float* out, int) { out[threadIdx.x / 2] = 1; }
__global__ void blocks_write(float* out, int) { out[threadIdx.x] = blockIdx.x; }
__global__ void wide_shift(float* out, int n) { out[threadIdx.x] = 1 << (n + threadIdx.x); }
__global__ void overflows(float* out, int n) { out[threadIdx.x] = static_cast<float>(n * 40000000 + static_cast<int>(threadIdx.x)); }

__global__ void own_array(float* out, int n) {
  float v[4] = {1, 2, 3, 4};
  out[threadIdx.x] = v[n % 4 + threadIdx.x];
}

__global__ void barrier_in_a_branch(float* out, int) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void some_have_ended(float* out, int) {
  if (threadIdx.x > 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void lanes_have_ended(float* out, int) {
  if (threadIdx.x % 32 > 20) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void too_much_shared(float* out, int) {
  __shared__ float v[13 * 1024];
  v[threadIdx.x] = 1;
  out[threadIdx.x] = v[threadIdx.x];
}

const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();

// Each block gives the next one its number, through shared memory.
__device__ float from_the_next(float* mine) { return *cluster.map_shared_rank(mine, (cluster.block_rank() + 1) % cluster.num_blocks()); }

__global__ void of_a_cluster(float* out, int) {
  __shared__ float mine;
  extern __shared__ float dynamic[];
  if (threadIdx.x == 0) mine = dynamic[5] = 1.0f + blockIdx.x;
  cluster.sync();
  const float next = from_the_next(&mine), far = cluster.map_shared_rank(dynamic, cluster.num_blocks() - 1)[5];
  if (threadIdx.x == 0) out[blockIdx.x] = 10 * next + far;
  cluster.sync();
}

__global__ void no_cluster_barrier(float* out, int) {
  __shared__ float mine;
  if (threadIdx.x == 0) mine = 1;
  __syncthreads();
  const float next = from_the_next(&mine);
  if (threadIdx.x == 0) out[blockIdx.x] = next;
  cluster.sync();
}

__global__ void written_by_another(float* out, int) {
  __shared__ float mine;
  if (threadIdx.x == 0) mine = 1;
  cluster.sync();
  if (threadIdx.x == 0) *cluster.map_shared_rank(&mine, 0) = 2;   // all of them
  cluster.sync();
  if (threadIdx.x == 0) out[blockIdx.x] = mine;
}

__global__ void may_have_ended(float* out, int) {
  __shared__ float mine;
  if (threadIdx.x == 0) mine = 1;
  cluster.sync();
  const float next = from_the_next(&mine);
  if (threadIdx.x == 0) out[blockIdx.x] = next;
}

__global__ void some_of_a_cluster_have_ended(float* out, int) {
  if (cluster.block_rank() == 1) return;
  cluster.sync();
  out[threadIdx.x] = 1;
}

__global__ void no_such_block(float* out, int) {
  __shared__ float mine;
  if (threadIdx.x == 0) mine = 1;
  cluster.sync();
  out[threadIdx.x] = *cluster.map_shared_rank(&mine, static_cast<int>(cluster.num_blocks()));
}

using Kernel = void (*)(float*, int);
struct Named { const char* name; Kernel kernel; };
const Named kernels[] = {
    {"right", right}, {"no_barrier", no_barrier}, {"one_barrier_of_two", one_barrier_of_two}, {"no_warp_barrier", no_warp_barrier},
    {"warp_barrier", warp_barrier}, {"never_written", never_written}, {"beyond", beyond}, {"partly_beyond", partly_beyond},
    {"misaligned", misaligned}, {"two_write", two_write}, {"blocks_write", blocks_write}, {"wide_shift", wide_shift},
    {"overflows", overflows}, {"own_array", own_array}, {"barrier_in_a_branch", barrier_in_a_branch}, {"some_have_ended", some_have_ended},
    {"lanes_have_ended", lanes_have_ended}, {"too_much_shared", too_much_shared}, {"of_a_cluster", of_a_cluster},
    {"no_cluster_barrier", no_cluster_barrier}, {"written_by_another", written_by_another}, {"may_have_ended", may_have_ended},
    {"some_of_a_cluster_have_ended", some_of_a_cluster_have_ended}, {"no_such_block", no_such_block}};

constexpr int kBlocks = 2;   // of a cluster

void launch_clusters(Kernel kernel, int blocks, int bytes, void* stream, float* out, int n) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(blocks);
  configuration.blockDim = dim3(kThreads);
  configuration.dynamicSmemBytes = bytes;
  configuration.stream = stream;
  configuration.attrs = &attribute;
  configuration.numAttrs = 1;
  cudaLaunchKernelEx(&configuration, kernel, out, n);
}

}  // namespace

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);

// What the launch says, or null. The input may not be written; `how` names a mistake of the launch.
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, const char* how, float* out, int n, int blocks) {
  const auto is = [&](const char* mistake) { return std::strcmp(how, mistake) == 0; };
  on_host::call_begins();
  on_host::may_access(out, n * sizeof(float));
  if (!is("an input")) on_host::may_write(out);
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(is("a stream of another device"), &stream);
  if (is("no stream")) stream = nullptr;
  if (is("a read on the host")) out[0] += 1;
  const int threads = is("many threads") ? 2048 : is("beyond its bounds") ? 128 : kThreads;
  for (const Named& named : kernels) {
    if (std::strcmp(named.name, name) != 0) continue;
    const Kernel kernel = named.kernel;
    if (is("in clusters, asked for")) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000);
    if (std::strncmp(how, "in clusters", 11) == 0) launch_clusters(kernel, blocks, is("in clusters") ? 64 : 50000, stream, out, n);
    else if (kernel == right) right<<<blocks, threads, 0, stream>>>(out, n);   // by its name, with its bounds
    else kernel<<<blocks, threads, is("much shared memory") ? 50000 : 0, stream>>>(out, n);
  }
  const char* fault = nullptr;
  on_host::call_ends(&fault);
  return fault;
}

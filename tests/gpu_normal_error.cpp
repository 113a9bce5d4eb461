// What a GPU would compute, on the host: the radius with logarithms and roots as wrong as the hardware's documented bounds allow, and the
// words of a tile's blocks. `gpu_normal_error STRIDE SIGN` with SIGN -1, 0 or 1 of the errors.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#define FS_HARDWARE static inline
static float sign = 0;
static float hardware_log2(float u) {
  const double exact = std::log2(static_cast<double>(u));
  return static_cast<float>(exact + sign * 0x1p-22 * (u > 0.5f && u < 2 ? 1 : std::abs(exact)));
}
static float hardware_rsqrt(float q) { return static_cast<float>(1 / std::sqrt(static_cast<double>(q)) * (1 + sign * 1.28e-7)); }
using std::fmaf;
using std::fmaxf;
#include "philox.h"

using namespace fastscore;

int main(int, char** arguments) {
  const uint64_t stride = std::strtoull(arguments[1], nullptr, 10), count = 0xffffffffu / stride + 1;
  sign = static_cast<float>(std::atof(arguments[2]));
  double near_error = 0, far_error = 0, least = 1e9;
  for (uint64_t i = 0; i < count; ++i) {
    const uint32_t w = static_cast<uint32_t>(i * stride);
    const double t = (~w + 0.5) * 0x1p-32, exact = std::sqrt(-2 * (w >> 31 ? std::log1p(-t) : std::log((w + 0.5) * 0x1p-32)));
    const double r = static_cast<double>(root_log(w)) * 1.1774100225154747, error = std::abs(r - exact);   // sqrt(2 ln 2)
    (exact < 4 ? near_error : far_error) = std::max(exact < 4 ? near_error : far_error, error);
    least = std::min(least, r);
  }
  uint64_t state = 1, wrong = 0;
  const auto draw = [&] { return static_cast<uint32_t>((state = state * 6364136223846793005u + 1442695040888963407u) >> 32); };
  for (int i = 0; i < 100000; ++i) {
    const uint32_t block = draw(), upper = draw(), step = draw(), stream = draw(), k0 = draw(), k1 = draw();
    const Words tile = PhiloxTile(upper, step, stream, round_keys(k0, k1))(block);
    const Words words = philox(static_cast<uint64_t>(upper) << 32 | block, step, stream, k0, k1);
    wrong += !std::equal(tile.w, tile.w + 4, words.w);
  }
  std::printf("{\"near\": %.17g, \"far\": %.17g, \"least\": %.17g, \"wrong\": %llu}\n", near_error, far_error, least,
              static_cast<unsigned long long>(wrong));
}

// How far the radius of the normals and the uniforms are from float64, over every STRIDE-th word from 0 on: `normal_error STRIDE`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "normal_cpu.h"

using namespace fastscore;

int main(int, char** arguments) {
  const uint64_t stride = std::strtoull(arguments[1], nullptr, 10), count = 0xffffffffu / stride + 1;
  double radius_error = 0, uniform_error = 0, least = 1e9, most = 0;
  uint64_t misrounded = 0;
  for (uint64_t first = 0; first < count; first += kLanes) {
    vu words, none{};
    vf radius, sine;
    for (int i = 0; i < kLanes; ++i) words[i] = static_cast<uint32_t>(std::min(first + i, count - 1) * stride);
    box_muller<1>(&words, &none, &radius, &sine);   // odd words of 0: the angle is 0
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t w = words[i];
      const double r = radius[i], exact = std::sqrt(-2 * std::log((w + 0.5) * 0x1p-32));
      radius_error = std::max(radius_error, std::abs(r - exact));
      least = std::min(least, r);
      most = std::max(most, r);
      const double u = ((w >> 8) + 0.5) * 0x1p-24;
      uniform_error = std::max(uniform_error, std::abs(uniform(w) - u));
      misrounded += uniform(w) != static_cast<float>(u);
    }
  }
  std::printf("{\"words\": %llu, \"radius_error\": %.17g, \"least\": %.17g, \"most\": %.17g, \"uniform_error\": %.17g, \"misrounded\": %llu}\n",
              static_cast<unsigned long long>(count), radius_error, least, most, uniform_error, static_cast<unsigned long long>(misrounded));
}

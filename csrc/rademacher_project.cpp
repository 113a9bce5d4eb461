#include "rademacher_project.h"

#include "signed_rows.h"

namespace fastscore {
namespace {

// The elements [first, first + n) of a tensor, in place or gathered.
template <class T>
FS_INLINE const T* gathered(const void* tensor, const Nest& nest, int64_t first, int64_t n, T* buffer) {
  const T* p = static_cast<const T*>(tensor);
  if (nest.contiguous) return p + first;
  const int64_t stride = nest.strides[0][nest.ndim - 1];
  for_rows(nest, first, n, [&](int64_t at, const int64_t* offset, int64_t m) FS_LAMBDA {
    for (int64_t i = 0; i < m; ++i) buffer[at + i] = p[offset[0] + i * stride];
  });
  return buffer;
}

template <class T>
FS_INLINE void scatter(const T* buffer, void* tensor, const Nest& nest, int64_t first, int64_t n) {
  T* p = static_cast<T*>(tensor);
  if (nest.contiguous) return;
  const int64_t stride = nest.strides[0][nest.ndim - 1];
  for_rows(nest, first, n, [&](int64_t at, const int64_t* offset, int64_t m) FS_LAMBDA {
    for (int64_t i = 0; i < m; ++i) p[offset[0] + i * stride] = buffer[at + i];
  });
}

// task(sample, how many samples, where in the sample, elements of each)
template <class Args, class Task>
FS_INLINE void in_tasks(const Args& p, int64_t begin, int64_t end, Task task) {
  const int64_t fit = p.per_sample < kSignChunk ? kSignChunk / p.per_sample : 1;
  for (int64_t t = begin; t < end;) {
    if (p.chunks == 1) {
      const int64_t count = end - t < fit ? end - t : fit;
      task(t, count, 0, p.per_sample);
      t += count;
    } else {
      const int64_t from = t % p.chunks * kSignChunk, left = p.per_sample - from;
      task(t / p.chunks, 1, from, left < kSignChunk ? left : kSignChunk);
      ++t;
    }
  }
}

// Short samples of one run: signed as a whole, a tile at a time.
template <class T, class Emit>
FS_INLINE void short_sums(const T* j, const T* s, Signs& signs, uint64_t first, int64_t count, int64_t d, bool square, Emit emit) {
  using A = typename Compute<T>::type;
  alignas(64) A js[kTileOfShort], ss[kTileOfShort];
  for (int64_t c = 0, m; c < count; c += m) {
    m = count - c < kTileOfShort / d ? count - c : kTileOfShort / d;
    const uint32_t* bits = signs.from(first + static_cast<uint64_t>(c * d), m * d);
    if (j) signed_tile(j + c * d, bits, m * d, js);
    if (s) signed_tile(s + c * d, bits, m * d, ss);
    for (int64_t k = 0; k < m; ++k) {
      double sum[3] = {};
      for (int64_t i = k * d; j && i < (k + 1) * d; ++i) sum[0] += js[i];
      for (int64_t i = k * d; s && i < (k + 1) * d; ++i) sum[1] += ss[i];
      for (int64_t i = k * d; s && square && i < (k + 1) * d; ++i) sum[2] += static_cast<double>(ss[i]) * ss[i];
      emit(c + k, sum);
    }
  }
}

template <class T>
void project(const ProjectArgs& p, int64_t begin, int64_t end) {
  using A = typename Compute<T>::type;
  Signs signs;
  alignas(64) T js_buffer[kSignChunk], s_buffer[kSignChunk];
  in_tasks(p, begin, end, [&](int64_t b, int64_t count, int64_t from, int64_t n) FS_LAMBDA {
    const int64_t first = b * p.per_sample + from;
    const uint64_t origin = p.key.offset + static_cast<uint64_t>(first);
    const T* s = p.s ? gathered(p.s, p.s_nest, first, count * n, s_buffer) : nullptr;
    for (int64_t m = 0; m < p.projections; ++m) {
      const auto emit = [&](int64_t c, const double* sum) FS_LAMBDA {
        if (p.partial) {
          double* row = p.partial + (b * p.chunks + from / kSignChunk) * (2 * p.projections + 1);
          row[m] = sum[0], row[p.projections + m] = sum[1];
          if (m == 0) row[2 * p.projections] = sum[2];
          return;
        }
        if (p.js) static_cast<A*>(p.vjv)[m * p.samples + b + c] = static_cast<A>(sum[0]);
        if (p.s) static_cast<A*>(p.vs)[m * p.samples + b + c] = static_cast<A>(sum[1]);
        if (p.s && m == 0) static_cast<A*>(p.ss)[b + c] = static_cast<A>(sum[2]);
      };
      signs.fill(origin, count * n, p.key, m);
      const T* j = p.js ? gathered(p.js, p.js_nest, m * p.samples * p.per_sample + first, count * n, js_buffer) : nullptr;
      if (n < kShort) {   // one alone, too: its sums are the same in any batch
        short_sums(j, s, signs, origin, count, n, m == 0, emit);
        continue;
      }
      for (int64_t c = 0; c < count; ++c) {
        const T *jc = j + c * n, *sc = s + c * n;
        const uint32_t* bits = signs.from(origin + static_cast<uint64_t>(c * n), n);
        double sum[3] = {};
        if (!s) row_sums<true, false, false>(jc, sc, bits, n, sum);
        else if (j && m == 0) row_sums<true, true, true>(jc, sc, bits, n, sum);
        else if (j) row_sums<true, true, false>(jc, sc, bits, n, sum);
        else if (m == 0) row_sums<false, true, true>(jc, sc, bits, n, sum);
        else row_sums<false, true, false>(jc, sc, bits, n, sum);
        emit(c, sum);
      }
    }
  });
}

// A coefficient per sample, repeated for the sample's elements.
template <class A>
FS_INLINE void repeat(const A* each, int64_t count, int64_t n, A* out) {
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < n; ++i) out[c * n + i] = each[c];
}

template <class T>
void spread(const SpreadArgs& p, int64_t begin, int64_t end) {
  using A = typename Compute<T>::type;
  Signs signs;
  alignas(64) T buffer[kSignChunk];
  alignas(64) A total[kSignChunk], each[kTileOfShort], signed_each[kTileOfShort];
  const A *g_vjv = static_cast<const A*>(p.g_vjv), *g_vs = static_cast<const A*>(p.g_vs), *g_ss = static_cast<const A*>(p.g_ss);
  in_tasks(p, begin, end, [&](int64_t b, int64_t count, int64_t from, int64_t n) FS_LAMBDA {
    const int64_t first = b * p.per_sample + from;
    const uint64_t origin = p.key.offset + static_cast<uint64_t>(first);
    const bool together = n < kShort && count > 1;
    if (p.gs && g_ss) {
      const T* s = gathered(p.s, p.s_nest, first, count * n, buffer);
      for (int64_t c = 0; c < count; ++c) {
        const A g = 2 * g_ss[b + c];
        for (int64_t i = c * n; i < (c + 1) * n; ++i) total[i] = g * widen(s[i]);
      }
    } else if (p.gs) {
      __builtin_memset(total, 0, count * n * sizeof(A));
    }
    for (int64_t m = 0; (g_vjv || g_vs) && m < p.projections; ++m) {
      signs.fill(origin, count * n, p.key, m);
      const int64_t at = m * p.samples + b, out_first = m * p.samples * p.per_sample + first;
      T* out = p.gjs && p.gjs_nest.contiguous ? static_cast<T*>(p.gjs) + out_first : buffer;
      const int64_t tile = together ? kTileOfShort / n : 1;
      for (int64_t c = 0, k; c < count; c += k) {
        k = count - c < tile ? count - c : tile;
        const uint32_t* bits = signs.from(origin + static_cast<uint64_t>(c * n), k * n);
        if (!together) {
          if (p.gjs) signed_row<false>(g_vjv + at + c, bits, n, out + c * n, p.bypass_cache);
          if (g_vs) add_signed_row(g_vs[at + c], bits, n, total + c * n);
          continue;
        }
        if (p.gjs) {
          repeat(g_vjv + at + c, k, n, each);
          signed_row<true>(each, bits, k * n, out + c * n, false);
        }
        if (g_vs) {
          repeat(g_vs + at + c, k, n, each);
          signed_row<true>(each, bits, k * n, signed_each, false);
          for (int64_t i = 0; i < k * n; ++i) total[c * n + i] += signed_each[i];
        }
      }
      if (p.gjs) scatter(buffer, p.gjs, p.gjs_nest, out_first, count * n);
    }
    if (!p.gs) return;
    T* out = p.gs_nest.contiguous ? static_cast<T*>(p.gs) + first : buffer;
    int64_t i = 0;
    if constexpr (__is_same(T, float))
      if (p.bypass_cache && reinterpret_cast<uintptr_t>(out) % 64 == 0)
        for (; i + kLanes <= count * n; i += kLanes) stream_vector(load_vector(total + i), out + i);
    if constexpr (!__is_same(T, double))
      for (; i + kLanes <= count * n; i += kLanes) store_vector(load_vector(total + i), out + i);
    for (; i < count * n; ++i) narrow(total[i], out[i]);
    scatter(buffer, p.gs, p.gs_nest, first, count * n);
  });
  if (p.bypass_cache) stream_fence();
}

}  // namespace

void FS_KERNEL(rademacher_project)(const ProjectArgs& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) { project<decltype(element)>(p, begin, end); });
}

void FS_KERNEL(rademacher_spread)(const SpreadArgs& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto element) { spread<decltype(element)>(p, begin, end); });
}

}  // namespace fastscore

#if defined(FASTSCORE_REGISTER)
#include <utility>
#include <vector>

#include "torch_cpu.h"

namespace fastscore {
namespace {

// Sizes, from js (M, B, *) and s (B, *), of which one may be missing, under their names.
template <class Args>
void sizes(const Checks& check, Args& p, const char* js_name, const OptionalTensor& js, const char* s_name, const OptionalTensor& s,
           int64_t projections, int64_t stream) {
  if (!js && !s) check.refuse("either ", js_name, " or ", s_name, " must be given");
  check.number("projections", projections, 1, 65536 - (stream >> 16));   // the substream counts them
  p.dtype = check.floating(js ? js_name : s_name, js ? *js : *s);
  if (js && (js->dim() < 2 || js->size(0) != projections))
    check.refuse(js_name, " must be (", projections, ", B, *); got ", shown(js->sizes()));
  if (s && s->dim() < 1) check.refuse(s_name, " must be (B, *); got ()");
  if (js && s) {
    check.memory(s_name, *s);
    check.dtype(s_name, *s, p.dtype);
    check.shape(s_name, *s, js->sizes().slice(1));
  }

  p.projections = projections;
  p.samples = js ? js->size(1) : s->size(0);
  const int64_t n = js ? js->numel() / projections : s->numel();
  p.per_sample = p.samples > 0 ? n / p.samples : 0;
}

int64_t chunks(int64_t per_sample) { return per_sample <= kSignChunk ? 1 : (per_sample + kSignChunk - 1) / kSignChunk; }

template <class Args>
int64_t grain(const Args& p) {
  const int64_t task = (p.chunks == 1 ? p.per_sample : kSignChunk) * p.projections;
  return (32768 + task - 1) / task;
}

}  // namespace

void launch(ProjectArgs& p) {
  p.chunks = chunks(p.per_sample);
  const int64_t tasks = p.samples * p.chunks, sums = 2 * p.projections + 1;
  std::vector<double> partial(p.chunks > 1 ? tasks * sums : 0);
  p.partial = p.chunks > 1 ? partial.data() : nullptr;
  const auto kernel = FS_PICK(rademacher_project);
  torch::stable::parallel_for(0, tasks, grain(p), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  if (p.chunks == 1) return;
  const auto put = [&](void* out, int64_t at, double value) {
    if (!out) return;
    if (p.dtype == kFloat64) static_cast<double*>(out)[at] = value;
    else static_cast<float*>(out)[at] = static_cast<float>(value);
  };
  for (int64_t b = 0; b < p.samples; ++b)
    for (int64_t k = 0; k < sums; ++k) {
      double total = 0;
      for (int64_t c = 0; c < p.chunks; ++c) total += partial[(b * p.chunks + c) * sums + k];
      if (k < p.projections) put(p.vjv, k * p.samples + b, total);
      else if (k < 2 * p.projections) put(p.vs, (k - p.projections) * p.samples + b, total);
      else put(p.ss, b, total);
    }
}

void launch(SpreadArgs& p) {
  p.chunks = chunks(p.per_sample);
  const int64_t elements = p.samples * p.per_sample, bytes = elements * (p.dtype == kFloat64 ? 8 : p.dtype == kFloat32 ? 4 : 2);
  p.bypass_cache = p.dtype == kFloat32 && elements * (p.gjs ? p.projections : 1) >= (int64_t{1} << 22);
  if (p.gjs) advise_huge_pages(p.gjs, bytes * p.projections);
  if (p.gs) advise_huge_pages(p.gs, bytes);
  const auto kernel = FS_PICK(rademacher_spread);
  torch::stable::parallel_for(0, p.samples * p.chunks, grain(p), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

namespace {

void rademacher_project(OptionalTensor vjv, OptionalTensor vs, OptionalTensor ss, OptionalTensor js, OptionalTensor s, int64_t projections,
                        OptionalTensor key, int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  const Checks check{"rademacher_project"};
  ProjectArgs p{};
  check.key(key, stream, offset);
  sizes(check, p, "js", js, "s", s, projections, stream);
  const DType wide = compute_dtype(p.dtype);
  check.present("vjv", vjv, js.has_value(), "js");
  check.present("vs", vs, s.has_value(), "s");
  check.present("ss", ss, s.has_value(), "s");
  check.table("vjv", vjv, wide, {projections, p.samples});
  check.table("vs", vs, wide, {projections, p.samples});
  check.table("ss", ss, wide, {p.samples});
  for (const auto& [name, out] : {std::pair<const char*, const OptionalTensor&>{"vjv", vjv}, {"vs", vs}, {"ss", ss}}) {
    check.apart(name, out, "js", js);
    check.apart(name, out, "s", s);
  }

  p.vjv = mutable_pointer(vjv), p.vs = mutable_pointer(vs), p.ss = mutable_pointer(ss);
  p.js = pointer(js), p.s = pointer(s);
  p.key = noise_key(key, seed, step, stream, offset);
  if (p.per_sample == 0) {
    for (const OptionalTensor& t : {vjv, vs, ss})
      if (t) torch::stable::zero_(*const_cast<OptionalTensor&>(t));
    return;
  }
  if (js) p.js_nest = nest_of(*js, std::nullopt, std::nullopt);
  if (s) p.s_nest = nest_of(*s, std::nullopt, std::nullopt);
  launch(p);
}

void rademacher_spread(OptionalTensor gjs, OptionalTensor gs, OptionalTensor g_vjv, OptionalTensor g_vs, OptionalTensor g_ss,
                       OptionalTensor s, int64_t projections, OptionalTensor key, int64_t seed, int64_t step, int64_t stream, int64_t offset) {
  const Checks check{"rademacher_spread"};
  SpreadArgs p{};
  check.key(key, stream, offset);
  sizes(check, p, "gjs", gjs, "gs", gs, projections, stream);
  const DType wide = compute_dtype(p.dtype);
  check.present("g_vjv", g_vjv, gjs.has_value(), "gjs");
  if (!gs) check.present("g_vs", g_vs, false, "gs");
  if (!gs) check.present("g_ss", g_ss, false, "gs");
  if (g_ss) check.present("s", s, true, "g_ss");
  check.table("g_vjv", g_vjv, wide, {projections, p.samples});
  check.table("g_vs", g_vs, wide, {projections, p.samples});
  check.table("g_ss", g_ss, wide, {p.samples});
  if (gs) check.like("s", s, *gs);
  for (const auto& [name, out] : {std::pair<const char*, const OptionalTensor&>{"gjs", gjs}, {"gs", gs}}) {
    if (out) check.written(name, *out);
    check.apart(name, out, "g_vjv", g_vjv);
    check.apart(name, out, "g_vs", g_vs);
    check.apart(name, out, "g_ss", g_ss);
    check.apart(name, out, "s", s);
  }

  p.gjs = mutable_pointer(gjs), p.gs = mutable_pointer(gs);
  p.g_vjv = pointer(g_vjv), p.g_vs = pointer(g_vs), p.g_ss = pointer(g_ss), p.s = pointer(s);
  p.key = noise_key(key, seed, step, stream, offset);
  if (p.per_sample == 0) return;
  if (gjs) p.gjs_nest = nest_of(*gjs, std::nullopt, std::nullopt);
  if (gs) p.gs_nest = nest_of(*gs, std::nullopt, std::nullopt);
  if (s) p.s_nest = nest_of(*s, std::nullopt, std::nullopt);
  launch(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastscore, m) {
  m.def("rademacher_project(Tensor(a!)? vjv, Tensor(b!)? vs, Tensor(c!)? ss, Tensor? js, Tensor? s, int projections, Tensor? key, "
        "int seed, int step, int stream, int offset) -> ()");
  m.def("rademacher_spread(Tensor(a!)? gjs, Tensor(b!)? gs, Tensor? g_vjv, Tensor? g_vs, Tensor? g_ss, Tensor? s, int projections, "
        "Tensor? key, int seed, int step, int stream, int offset) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastscore, CPU, m) {
  m.impl("rademacher_project", TORCH_BOX(&rademacher_project));
  m.impl("rademacher_spread", TORCH_BOX(&rademacher_spread));
}

}  // namespace fastscore
#endif

// The doors of dual numbers: stacks (1 + M, *) of a value and its M tangents, between the products of a network.
#include "door_stacks.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "activate.h"
#include "normalise.h"
#include "plain.h"
#include "rademacher_project.h"

namespace fastscore {
namespace {

// The whole number of directions of a stack (1 + M, B, *).
bool look_stack(PyObject* o, View& v, int64_t& directions) {
  if (!look_float(o, v) || v.t.ndim < 2) return false;
  directions = v.t.shape[0] - 1;
  return directions >= 1;
}

// The tangents (M, B, *) of a stack, and its value (B, *).
struct Parts {
  std::vector<int64_t> tangent_shape;
  View tangents, value;

  explicit Parts(const View& stack) : tangent_shape(stack.t.shape, stack.t.shape + stack.t.ndim), tangents(stack), value(stack) {
    tangent_shape[0] -= 1;
    tangents.t.shape = tangent_shape.data();
    tangents.t.byte_offset += stack.t.strides[0] * size_of(stack.dtype);
    --value.t.ndim;
    ++value.t.shape;
    ++value.t.strides;
    value.n = stack.n / stack.t.shape[0];
    tangents.n = stack.n - value.n;
  }
};

// A new stack (rows, *sizes) of the type of `like`.
PyObject* new_stack(PyObject* like, int64_t rows, const int64_t* sizes, int32_t count) {
  const Ref shape(PyTuple_New(1 + count));
  if (!shape) return nullptr;
  PyTuple_SetItem(shape.o, 0, PyLong_FromLongLong(rows));
  for (int32_t d = 0; d < count; ++d) PyTuple_SetItem(shape.o, 1 + d, PyLong_FromLongLong(sizes[d]));
  return PyObject_CallMethodObjArgs(like, torch_.new_empty, shape.o, nullptr);
}

template <class Args>
void sizes(const View& stack, int64_t directions, Args& p) {
  p.dtype = stack.dtype;
  p.projections = directions;
  p.samples = stack.t.shape[1];
  p.per_sample = stack.n / stack.t.shape[0] / p.samples;
}

}  // namespace

// activate(s, g, directions, activation, overwrite): y and its derivatives; or, with g, the cotangents of s, in the memory of g if overwrite is
// True. Of directions None the stack is a value and its tangents; of M it holds second derivatives, too, unless they are 0.
PyObject* door_activate(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !torch_.describe || !nothing_between()) return refused();
  View s, g, out;
  int64_t directions = 0, activation;
  if (!look_float(args[0], s) || s.dtype == kFloat64 || s.t.ndim < 1 || !s.contiguous()) return refused();
  const int64_t rows = s.t.shape[0], n = s.n / rows;
  const bool second = args[2] != Py_None;
  if ((second && !integer(args[2], 1, rows - 1, directions)) || !integer(args[3], kElu, kGeluTanh, activation)) return refused();
  const bool straight = second && rows == 1 + directions, overwrite = args[4] == Py_True;
  if (second && !straight && rows != 1 + 2 * directions) return refused();

  View all = s;   // what y and its derivatives are like
  std::vector<int64_t> shape(s.t.shape, s.t.shape + s.t.ndim);
  if (straight) shape[0] += directions;
  all.t.shape = shape.data();
  const bool backward = args[1] != Py_None;
  if (backward && (!look_float(args[1], g) || !g.like(all) || !g.contiguous())) return refused();
  if (overwrite && (!backward || straight)) return refused();

  const bool longer = straight && !backward;
  const Ref result(longer ? new_stack(args[0], shape[0], s.t.shape + 1, s.t.ndim - 1) : destination(overwrite ? args[1] : Py_None, args[0], s, out));
  if (!result || (longer && !look_made(result.o, out)) || !out.contiguous()) return refused();

  const ActivateArgs p{out.data(), s.data(), backward ? g.data() : nullptr, s.dtype, n, second ? directions : rows - 1, straight,
                       static_cast<int>(activation)};
  without_python(s.n, [&] { launch(p, second); });
  if (overwrite && !written(args[1])) return nullptr;
  Py_INCREF(result.o);
  return result.o;
}

// signed_stack(x, directions, seed, step, stream, offset): x and M directions of signs, (1 + M, *x.shape).
PyObject* door_signed_stack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6 || !torch_.describe || !nothing_between()) return refused();
  View x, out;
  SpreadArgs p{};
  if (!look_float(args[0], x) || x.t.ndim < 1 || !x.contiguous() || !integer(args[1], 1, 65536, p.projections)) return refused();
  if (!read_key(args[2], args[3], args[4], 0, args[5], p.key)) return refused();

  const Ref result(new_stack(args[0], 1 + p.projections, x.t.shape, x.t.ndim));
  if (!look_made(result.o, out) || !out.contiguous()) return refused();

  // To the signs all of x is one sample.
  const int64_t bytes = x.n * size_of(x.dtype), rows[] = {p.projections, 1, x.n}, strides[] = {x.n, x.n, 1};
  const int64_t* each[kMaxTensors] = {strides, nullptr, nullptr};
  p.dtype = x.dtype;
  p.samples = 1;
  p.per_sample = x.n;
  p.gjs = out.data() + bytes;
  p.gjs_nest = nest_of(3, rows, each);
  std::vector<double> ones(p.projections);   // memory for those of either compute type
  if (x.dtype == kFloat64) std::fill_n(ones.data(), p.projections, 1.0);
  else std::fill_n(reinterpret_cast<float*>(ones.data()), p.projections, 1.0f);
  p.g_vjv = ones.data();
  without_python(out.n, [&] {
    std::memcpy(out.data(), x.data(), bytes);
    launch(p);
  });
  Py_INCREF(result.o);
  return result.o;
}

// project_stack(stack, seed, step, stream, offset): (v.Jv (M, B), v.s (M, B), |s|^2 (B,)) in the compute type, of a stack of s and Jv.
PyObject* door_project_stack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !torch_.describe || !nothing_between()) return refused();
  View stack, sums[3];
  ProjectArgs p{};
  int64_t directions;
  if (!look_stack(args[0], stack, directions) || !read_key(args[1], args[2], args[3], 0, args[4], p.key)) return refused();
  if (stack.dtype != kFloat32 && stack.dtype != kFloat64) return refused();   // the sums are of its type
  sizes(stack, directions, p);

  const Ref samples(PyLong_FromLongLong(p.samples)), rows(PyLong_FromLongLong(directions));
  const auto made = [&](PyObject* first, PyObject* second) { return PyObject_CallMethodObjArgs(args[0], torch_.new_empty, first, second, nullptr); };
  const Ref vjv(made(rows.o, samples.o)), vs(made(rows.o, samples.o)), ss(made(samples.o, nullptr));
  if (!look_made(vjv.o, sums[0]) || !look_made(vs.o, sums[1]) || !look_made(ss.o, sums[2])) return refused();

  const Parts parts(stack);
  p.js = parts.tangents.data();
  p.js_nest = nest_of(parts.tangents, nullptr, nullptr);
  p.s = parts.value.data();
  p.s_nest = nest_of(parts.value, nullptr, nullptr);
  p.vjv = sums[0].data();
  p.vs = sums[1].data();
  p.ss = sums[2].data();
  without_python(stack.n, [&] { launch(p); });
  return PyTuple_Pack(3, vjv.o, vs.o, ss.o);
}

// spread_stack(stack, g_vjv, g_vs, g_ss, seed, step, stream, offset): the cotangent of a stack of s and Jv for those of its projections, of
// which g_vs or g_ss may be None.
PyObject* door_spread_stack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8 || !torch_.describe || !nothing_between()) return refused();
  View stack, out, g[3];
  SpreadArgs p{};
  int64_t directions;
  if (!look_stack(args[0], stack, directions) || !read_key(args[4], args[5], args[6], 0, args[7], p.key)) return refused();
  if (args[1] == Py_None || (args[2] == Py_None && args[3] == Py_None)) return refused();
  sizes(stack, directions, p);

  const DType compute = stack.dtype == kFloat64 ? kFloat64 : kFloat32;
  const int64_t lengths[] = {directions * p.samples, directions * p.samples, p.samples};
  const void** places[] = {&p.g_vjv, &p.g_vs, &p.g_ss};
  for (int k = 0; k < 3; ++k) {
    if (args[1 + k] == Py_None) continue;
    if (!look(args[1 + k], g[k]) || g[k].dtype != compute || g[k].n != lengths[k] || !g[k].contiguous()) return refused();
    *places[k] = g[k].data();
  }
  const Ref result(destination(Py_None, args[0], stack, out));
  if (!result) return refused();

  const Parts given(stack), made(out);
  p.gjs = made.tangents.data();
  p.gjs_nest = nest_of(made.tangents, nullptr, nullptr);
  p.gs = made.value.data();
  p.gs_nest = nest_of(made.value, nullptr, nullptr);
  if (p.g_ss) {
    p.s = given.value.data();
    p.s_nest = nest_of(given.value, nullptr, nullptr);
  }
  without_python(stack.n, [&] { launch(p); });
  Py_INCREF(result.o);
  return result.o;
}

// normalise_stack(s, coef, labels, groups, alpha, beta, eps, activation, keep): the norm of a stack (1 + M, B, C, *) in C order, with the table
// of its coefficients; beside its statistics (1 + M, B, C, 2) if keep is True.
PyObject* door_normalise_stack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9 || !torch_.describe || !nothing_between()) return refused();
  View s, out, coef, labels, stats;
  NormArgs p{};
  int64_t activation;
  if (!look_stack(args[0], s, p.tangents) || s.t.ndim < 4 || !s.contiguous()) return refused();
  p.dtype = s.dtype;
  p.batch = s.t.shape[1];
  p.channels = s.t.shape[2];
  p.pixels = s.n / (s.t.shape[0] * p.batch * p.channels);
  if (!integer(args[3], 0, p.channels, p.groups) || (p.groups && p.channels % p.groups)) return refused();
  for (PyObject* flag : {args[4], args[5], args[8]})
    if (flag != Py_True && flag != Py_False) return refused();
  p.has_alpha = args[4] == Py_True;
  p.has_beta = args[5] == Py_True;
  if (!PyFloat_CheckExact(args[6]) || !integer(args[7], kIdentity, kGeluTanh, activation)) return refused();
  p.eps = PyFloat_AsDouble(args[6]);
  p.activation = static_cast<int>(activation);
  if (!(p.eps > 0 && p.eps <= __FLT_MAX__) || (p.groups && p.has_alpha)) return refused();

  const DType wide = s.dtype == kFloat64 ? kFloat64 : kFloat32;
  if (!look(args[1], coef) || coef.dtype != wide || coef.t.ndim != 2 || !coef.contiguous()) return refused();
  p.coef = coef.data();
  p.coef_rows = coef.t.shape[0];
  if (coef.t.shape[1] != p.channels * (1 + p.has_alpha + p.has_beta)) return refused();
  if (args[2] == Py_None) {
    if (p.coef_rows != 1 && p.coef_rows != p.batch) return refused();
  } else {
    if (!look(args[2], labels) || labels.dtype != kInt64 || labels.t.ndim != 1 || labels.n != p.batch || !labels.contiguous()) return refused();
    p.labels = reinterpret_cast<const int64_t*>(labels.data());
    for (int64_t b = 0; b < p.batch; ++b)
      if (p.labels[b] < 0 || p.labels[b] >= p.coef_rows) return refused();
  }

  const bool keep = args[8] == Py_True;
  if (keep && s.dtype != wide) return refused();   // they are of another type than s
  std::vector<double> unkept(keep ? 0 : 2 * s.t.shape[0] * p.batch * p.channels);
  const Ref kept(keep ? PyObject_CallMethod(args[0], "new_empty", "((LLLi))", (long long)s.t.shape[0], (long long)p.batch, (long long)p.channels, 2) : nullptr);
  if (keep && !look_made(kept.o, stats)) return refused();
  const Ref result(destination(Py_None, args[0], s, out));
  if (!result || !out.contiguous()) return refused();

  const Parts given(s), made(out);
  p.x = given.value.data();
  p.t = given.tangents.data();
  p.y = made.value.data();
  p.ty = made.tangents.data();
  p.stats = keep ? static_cast<void*>(stats.data()) : unkept.data();
  advise_huge_pages(p.y, s.n * size_of(s.dtype));
  without_python(s.n, [&] { launch(p, false); });
  if (keep) return PyTuple_Pack(2, result.o, kept.o);
  Py_INCREF(result.o);
  return result.o;
}

}  // namespace fastscore

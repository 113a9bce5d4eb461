// From Python straight to the kernels of the CPU, and to those that serve a GPU (served.h). PyTorch's dispatcher takes longer than a small kernel; where it has nothing to do (plain
// tensors, plain numbers, no mode, no derivative), these functions go past it. Whatever is not plain they refuse by returning None:
// the caller then goes the way that checks everything and says what is wrong.
#include <Python.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "denoising_loss.h"
#include "door_stacks.h"
#include "given_noise.h"
#include "noisy_update.h"
#include "normalise.h"
#include "plain.h"
#include "random.h"
#include "served.h"

namespace fastscore {
namespace {

enum UpdateKind : long { kUpdate, kLangevin, kPerturb, kTerms };

// noisy_update(kind, x, direction, drift, diffusion, seed, step, stream, offset, out, noise). Of a Langevin step the drift is its step
// size; perturb has no direction; of kTerms, our own calls, either x or the direction may be missing. Noise, the last and optional, comes
// without a seed.
PyObject* noisy_update(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 10 || count > 11 || !torch_.describe || !nothing_between()) return refused();
  const long kind = PyLong_AsLong(args[0]);
  PyObject *x_object = args[1], *d_object = args[2], *drift_object = args[3], *diffusion_object = args[4];
  PyObject* z_object = count == 11 ? args[10] : Py_None;

  View x, d, z, out;
  const bool has_x = x_object != Py_None, has_d = d_object != Py_None, has_z = z_object != Py_None;
  if (kind == kTerms ? !(has_x || has_d) : !has_x || has_d == (kind == kPerturb)) return refused();
  if ((has_x && !look_float_anywhere(x_object, x)) || (has_d && !look_float_anywhere(d_object, d))) return refused();
  const View& like = has_x ? x : d;
  if (has_d && !d.like(like)) return refused();
  if (has_z && !(has_x && args[5] == Py_None && look_float(z_object, z) && z.like(x))) return refused();

  UpdateArgs p{};
  if (!has_z && !read_open_key(args[5], args[6], args[7], 0, args[8], p.key)) return refused();
  const double least = kind == kLangevin || kind == kPerturb ? 0 : -HUGE_VAL;
  if (const Server* server = server_of(like); server && has_z) return refused();
  else if (server) return served_update(*server, args, kind == kLangevin, least, has_x ? &x : nullptr, has_d ? &d : nullptr, p.key);

  Coefficient drift, diffusion;
  if (!read_coefficient(drift_object, like, least, drift)) return refused();
  const bool read = kind == kLangevin ? halve(drift_object, like, drift, diffusion) : read_coefficient(diffusion_object, like, least, diffusion);
  if (!read) return refused();

  Ref result(destination(args[9], has_x ? x_object : d_object, like, out));
  if (!result) return refused();
  for (const View* t : {has_x ? &x : nullptr, has_d ? &d : nullptr, has_z ? &z : nullptr})
    if (t && args[9] != Py_None && !out.same_place(*t) && out.overlaps(*t)) return refused();

  if (has_z) {
    if (!out.dense() || !out.lies_as(x) || !out.lies_as(z) || (has_d && !out.lies_as(d))) return refused();
    const GivenArgs given{out.data(), x.data(), has_d ? d.data() : nullptr, z.data(), x.dtype, drift.pointer(), diffusion.pointer(),
                          drift.number, diffusion.number, x.n, x.n / x.batch()};
    without_python(x.n, [&] { launch(given); });
    if (args[9] != Py_None && !written(args[9])) return nullptr;
    Py_INCREF(result.o);
    return result.o;
  }
  p.out = out.data();
  p.x = has_x ? x.data() : nullptr;
  p.direction = has_d ? d.data() : nullptr;
  p.dtype = like.dtype;
  p.nest = nest_of(out, has_x ? &x : nullptr, has_d ? &d : nullptr);
  p.n = like.n;
  p.per_sample = like.n / like.batch();
  p.drift = drift.number;
  p.diffusion = diffusion.number;
  p.drift_each = drift.pointer();
  p.diffusion_each = diffusion.pointer();
  if (!seeded(args[5], p.key)) return refused();
  without_python(p.n, [&] { launch(p); });
  if (args[9] != Py_None && !written(args[9])) return nullptr;
  Py_INCREF(result.o);
  return result.o;
}

// noise_reduce(mode, score, sigma, seed, step, stream, offset, noise): (B,) in the compute dtype. Noise as above.
PyObject* noise_reduce(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 7 || count > 8 || !torch_.describe || !nothing_between()) return refused();
  View s, z, out;
  ReduceArgs p{};
  Coefficient sigma;
  if (!look_float_anywhere(args[1], s) || s.t.ndim == 0) return refused();
  const Server* server = server_of(s);
  if (!server && !read_coefficient(args[2], s, 0, sigma)) return refused();
  const bool has_z = count == 8 && args[7] != Py_None;
  if (has_z && !(!server && args[3] == Py_None && look_float(args[7], z) && z.like(s) && z.lies_as(s))) return refused();
  if (!has_z && !read_key(args[3], args[4], args[5], 0, args[6], p.key)) return refused();

  const Ref batch(PyLong_FromLongLong(s.batch()));
  PyObject* made = nullptr;
  if (s.dtype == kFloat32 || s.dtype == kFloat64) {
    made = PyObject_CallMethodObjArgs(args[1], torch_.new_empty, batch.o, nullptr);
  } else {
    const Ref shape(PyTuple_Pack(1, batch.o)), options(PyDict_New()), device(PyObject_GetAttr(args[1], torch_.device));
    if (!device) return refused();
    PyDict_SetItem(options.o, torch_.dtype, torch_.float32);
    PyDict_SetItem(options.o, torch_.device, device.o);
    made = PyObject_Call(torch_.empty, shape.o, options.o);
  }
  const Ref result(made);
  if (!look_made(result.o, out) || !out.beside(s)) return refused();
  if (server) return served_reduce(*server, args, s, result.o, out, p.key);

  p.dtype = s.dtype;
  p.score = s.data();
  p.noise = has_z ? z.data() : nullptr;
  p.nest = nest_of(s, nullptr, nullptr);
  p.per_sample = s.n / s.batch();
  p.sigma = sigma.number;
  p.sigma_each = sigma.pointer();
  p.mode = static_cast<ReduceMode>(PyLong_AsLong(args[0]));
  without_python(s.n, [&] { launch(p, s.batch(), out.data()); });
  Py_INCREF(result.o);
  return result.o;
}

bool count_of(PyObject* shape, int64_t& n) {
  constexpr int64_t most = int64_t{1} << 40;
  if (!PyTuple_Check(shape)) return integer(shape, 1, most, n);
  n = 1;
  for (Py_ssize_t i = 0; i < PyTuple_Size(shape); ++i) {
    int64_t length;
    if (!integer(PyTuple_GetItem(shape, i), 1, most, length) || length > most / n) return false;
    n *= length;
  }
  return true;
}

// fill(kind, shape, seed, step, stream, substream, offset, dtype, device): a new tensor; dtype and device may be None.
PyObject* fill(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9 || !torch_.describe || !nothing_between()) return refused();
  int64_t n, substream;
  FillArgs p{};
  p.kind = static_cast<FillKind>(PyLong_AsLong(args[0]));
  if (!count_of(args[1], n) || !integer(args[5], 0, 65535, substream)) return refused();
  if (!read_open_key(args[2], args[3], args[4], substream, args[6], p.key)) return refused();

  // torch.empty reads sizes one by one in two thirds of the time that a tuple takes it.
  const bool sizes = PyTuple_Check(args[1]) && PyTuple_Size(args[1]) > 0;
  const Ref shape(sizes ? Py_NewRef(args[1]) : PyTuple_Pack(1, args[1]));
  PyObject* dtype = p.kind == kWords ? torch_.int64 : args[7];
  if (dtype == reinterpret_cast<PyObject*>(&PyFloat_Type)) return refused();   // which torch.empty takes for float64
  const bool plain = dtype == Py_None && args[8] == Py_None;
  const Ref options(plain ? nullptr : PyDict_New());
  if (dtype != Py_None) PyDict_SetItem(options.o, torch_.dtype, dtype);
  if (args[8] != Py_None) PyDict_SetItem(options.o, torch_.device, args[8]);
  const Ref result(PyObject_Call(torch_.empty, shape.o, options.o));
  View out;
  if (!look_made(result.o, out) || (p.kind == kWords) != (out.dtype == kInt64) || !seeded(args[2], p.key)) return refused();
  if (const Server* server = server_of(out)) return served_fill(*server, p.kind, result.o, out, p.key);

  p.out = out.data();
  p.dtype = out.dtype;
  without_python(n, [&] { launch(p, n); });
  Py_INCREF(result.o);
  return result.o;
}

// draw_seed(): an int from PyTorch's generator of the CPU.
PyObject* draw_seed(PyObject*, PyObject* const*, Py_ssize_t count) {
  int64_t seed;
  if (count != 0 || !torch_.describe || !nothing_between() || !draw(seed)) return refused();
  return PyLong_FromLongLong(seed);
}

// Of an image (B, C, *): whether it is contiguous as (B, C, S) or as (B, S, C), the two layouts that are read where they lie.
bool layout_of(const View& v, bool& channels_last) {
  const auto ordered = [&](bool last) {
    int64_t expected = 1;
    const auto next = [&](int32_t d) {
      const bool fits = v.t.shape[d] == 1 || v.t.strides[d] == expected;
      expected *= v.t.shape[d];
      return fits;
    };
    if (last && !next(1)) return false;
    for (int32_t d = v.t.ndim - 1; d >= 2; --d)
      if (!next(d)) return false;
    return (last || next(1)) && next(0);
  };
  channels_last = !ordered(false);
  return !channels_last || ordered(true);
}

// A column of coefficients, (C,) or (B, C) in the compute type.
bool look_column(PyObject* o, const View& x, View& v) {
  if (!look_anywhere(o, v) || !v.beside(x) || v.dtype != (x.dtype == kFloat64 ? kFloat64 : kFloat32)) return false;
  const int32_t d = v.t.ndim - 1;
  return (d == 0 || (d == 1 && v.t.shape[0] == x.t.shape[0])) && v.t.shape[d] == x.t.shape[1];
}

template <class A>
void pack(const View* columns, int count, int64_t rows, int64_t channels, A* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int k = 0; k < count; ++k) {
      const DLTensor& t = columns[k].t;
      const A* from = reinterpret_cast<const A*>(columns[k].data()) + (t.ndim == 2 ? r * t.strides[0] : 0);
      for (int64_t c = 0; c < channels; ++c) *out++ = from[c * t.strides[t.ndim - 1]];
    }
}

// Whether CUDA C++ computes a norm in clusters of blocks: the checked way launches that (in_clusters in fastscore/ops/normalise_core.py).
bool in_clusters(const Server& server, const View& x, const NormArgs& p, bool alpha) {
  return server.launches && server.launches->norm_clusters && !p.channels_last && p.dtype != kFloat64 &&
         server.launches->norm_clusters(x.t.device_id, p.channels, p.pixels, p.groups, alpha, size_of(p.dtype));
}

// normalise() of tensors that Triton's launchers serve: they get the columns, or the table, and the labels.
FS_APART PyObject* served_norm(Server server, PyObject* const* args, const View& x, NormArgs& p) {
  if (!server.launchers || in_clusters(server, x, p, args[2] != Py_None && args[2] != Py_False)) return refused();
  View part, out;
  Signature s;
  s.add('n'), s.add(x), s.add(p.channels_last), s.add(p.groups), s.add(p.eps), s.add(p.activation);
  const bool by_labels = args[4] != Py_None;
  const Ref columns(PyList_New(0));
  if (!by_labels) {
    p.has_alpha = args[2] != Py_None;
    p.has_beta = args[3] != Py_None;
    for (int k = 0; k < 3; ++k) {
      if (k > 0 && args[1 + k] == Py_None) continue;
      if (!look_column(args[1 + k], x, part)) return refused();
      s.add(static_cast<char>(part.t.ndim));
      if (PyList_Append(columns.o, args[1 + k])) return refused();
    }
  } else {
    for (PyObject* flag : {args[2], args[3]})
      if (flag != Py_True && flag != Py_False) return refused();
    p.has_alpha = args[2] == Py_True;
    p.has_beta = args[3] == Py_True;
    if (!look_anywhere(args[4], part) || !part.beside(x) || part.dtype != kInt64 || part.t.ndim != 1 || part.n != p.batch) return refused();
    if (!part.contiguous()) return refused();
    s.add_place(part);
    if (!look_anywhere(args[5], part) || !part.beside(x) || part.dtype != (x.dtype == kFloat64 ? kFloat64 : kFloat32)) return refused();
    if (part.t.ndim != 2 || part.t.shape[1] != (1 + p.has_alpha + p.has_beta) * p.channels || !part.contiguous()) return refused();
    s.add_place(part), s.add(part.t.shape[0]);
  }
  s.add(by_labels), s.add(p.has_alpha), s.add(p.has_beta);

  const Ref result(destination(Py_None, args[0], x, out));
  bool last;
  if (!result || !layout_of(out, last) || last != p.channels_last) return refused();
  s.add_place(out);
  PyObject* given = Py_BuildValue("(NOOOOLOOOi)", s.object(), result.o, args[0], by_labels ? args[5] : columns.o, args[4], p.groups,
                                  p.has_alpha ? Py_True : Py_False, p.has_beta ? Py_True : Py_False, args[7], p.activation);
  if (!launched_by(server, kNormLauncher, given)) return nullptr;
  Py_INCREF(result.o);
  return result.o;
}

// normalise(x, gamma, alpha, beta, labels, table, groups, eps, activation): columns, of which alpha and beta may be None; or a table of
// rows and its labels, and then alpha and beta are True or False.
PyObject* normalise(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9 || !torch_.describe || !nothing_between()) return refused();
  View x, out, columns[3], labels, table;
  NormArgs p{};
  int64_t activation;
  if (!look_float_anywhere(args[0], x) || x.t.ndim < 3 || !layout_of(x, p.channels_last)) return refused();
  p.dtype = x.dtype;
  p.batch = x.t.shape[0];
  p.channels = x.t.shape[1];
  p.pixels = x.n / (p.batch * p.channels);
  if (!PyFloat_CheckExact(args[7]) || !integer(args[8], 0, 63, activation)) return refused();
  p.eps = PyFloat_AsDouble(args[7]);
  p.activation = static_cast<int>(activation);
  if (!(p.eps >= std::pow(__FLT_MAX__, -2.0 / 3) && p.eps <= __FLT_MAX__)) return refused();
  if (!integer(args[6], 0, p.channels, p.groups) || (p.groups && p.channels % p.groups)) return refused();

  if (const Server* server = server_of(x)) return served_norm(*server, args, x, p);

  std::vector<double> memory;
  int width = 0;
  if (args[4] == Py_None) {
    for (int k = 0; k < 3; ++k) {
      if (k > 0 && args[1 + k] == Py_None) continue;
      if (!look_column(args[1 + k], x, columns[width])) return refused();
      ++width;
    }
    p.has_alpha = args[2] != Py_None;
    p.has_beta = args[3] != Py_None;
    p.coef_rows = 1;
    for (int k = 0; k < width; ++k)
      if (columns[k].t.ndim == 2) p.coef_rows = p.batch;
    memory.resize(p.coef_rows * width * p.channels);
    p.coef = memory.data();
    if (x.dtype == kFloat64) pack(columns, width, p.coef_rows, p.channels, memory.data());
    else pack(columns, width, p.coef_rows, p.channels, reinterpret_cast<float*>(memory.data()));
  } else {
    for (PyObject* flag : {args[2], args[3]})
      if (flag != Py_True && flag != Py_False) return refused();
    p.has_alpha = args[2] == Py_True;
    p.has_beta = args[3] == Py_True;
    width = 1 + p.has_alpha + p.has_beta;
    if (!look(args[4], labels) || labels.dtype != kInt64 || labels.t.ndim != 1 || labels.n != p.batch) return refused();
    if (!look(args[5], table) || table.dtype != (x.dtype == kFloat64 ? kFloat64 : kFloat32) || table.t.ndim != 2) return refused();
    if (table.t.shape[1] != width * p.channels || table.t.strides[1] != 1 || table.t.strides[0] != table.t.shape[1]) return refused();
    p.coef = table.data();
    p.coef_rows = table.t.shape[0];
    p.labels = reinterpret_cast<const int64_t*>(labels.data());
    if (labels.n > 1 && labels.t.strides[0] != 1) return refused();
    for (int64_t b = 0; b < p.batch; ++b)
      if (p.labels[b] < 0 || p.labels[b] >= p.coef_rows) return refused();
  }

  const Ref result(destination(Py_None, args[0], x, out));
  bool last;
  if (!result || !layout_of(out, last) || last != p.channels_last) return refused();
  std::vector<double> statistics(2 * p.batch * p.channels);
  p.x = x.data();
  p.y = out.data();
  p.stats = statistics.data();
  advise_huge_pages(p.y, x.n * size_of(x.dtype));
  without_python(x.n, [&] { launch(p, false); });
  Py_INCREF(result.o);
  return result.o;
}

PyObject* find(PyObject* root, std::initializer_list<const char*> names) {
  Py_INCREF(root);
  for (const char* name : names) {
    PyObject* next = root ? PyObject_GetAttrString(root, name) : nullptr;
    Py_XDECREF(root);
    root = next;
  }
  return root;
}

// launches(): where those of this build's CUDA C++ are entered; 0: there are none.
PyObject* launches(PyObject*, PyObject* const*, Py_ssize_t) {
  return PyLong_FromVoidPtr(cuda_launches.noisy_update ? &cuda_launches : nullptr);
}

// serve(device_type, launches, launchers): from now on tensors of this device, in DLPack's numbers, are run by the launches at this
// address, or by a tuple of Triton's launchers; by nobody where they are 0 and None.
PyObject* serve(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t device;
  if (count != 3 || !integer(args[0], kCpu, kCuda, device)) {
    PyErr_SetString(PyExc_ValueError, "serve: device_type must be 1 (CPU) or 2 (CUDA)");
    return nullptr;
  }
  const void* launches = PyLong_AsVoidPtr(args[1]);
  if (PyErr_Occurred()) return nullptr;
  if (args[2] != Py_None && (!PyTuple_Check(args[2]) || PyTuple_Size(args[2]) != kLaunchers)) {
    PyErr_SetString(PyExc_TypeError, "serve: launchers must be a tuple of four, or None");
    return nullptr;
  }
  Py_INCREF(args[2]);   // for ever: another thread may be calling one of those before
  servers_[device] = {static_cast<const Launches*>(launches), args[2] == Py_None ? nullptr : args[2]};
  Py_RETURN_NONE;
}

// open(torch): whether these functions can be used with this version of PyTorch.
PyObject* open(PyObject*, PyObject* torch) {
  const Ref capsule(find(torch, {"Tensor", "__dlpack_c_exchange_api__"}));
  const void* table = capsule ? PyCapsule_GetPointer(capsule.o, "dlpack_exchange_api") : nullptr;
  const auto* api = static_cast<const DLPackExchange*>(table);
  Torch t{};
  t.tensor = find(torch, {"Tensor"});
  t.parameter = find(torch, {"nn", "Parameter"});
  t.empty = find(torch, {"empty"});
  t.empty_like = find(torch, {"empty_like"});
  t.float32 = find(torch, {"float32"});
  t.int64 = find(torch, {"int64"});
  t.cpu = PyUnicode_InternFromString("cpu");
  t.increment_version = Function(find(torch, {"_C", "_increment_version"}));
  t.is_neg = find(torch, {"Tensor", "is_neg"});
  t.forward_ad = find(torch, {"autograd", "forward_ad"});
  t.level = PyUnicode_InternFromString("_current_level");
  t.requires_grad = PyUnicode_InternFromString("requires_grad");
  t.sqrt = PyUnicode_InternFromString("sqrt");
  t.new_empty = PyUnicode_InternFromString("new_empty");
  t.dtype = PyUnicode_InternFromString("dtype");
  t.device = PyUnicode_InternFromString("device");
  t.modes = Function(find(torch, {"_C", "_len_torch_dispatch_stack"}));
  t.function_modes = Function(find(torch, {"_C", "_is_torch_function_mode_enabled"}));
  t.transforms = Function(find(torch, {"_C", "_functorch", "maybe_current_level"}));
  t.tracing = Function(find(torch, {"_C", "_get_tracing_state"}));
  t.profiling = Function(find(torch, {"autograd", "_profiler_enabled"}));
  t.inference_mode = Function(find(torch, {"is_inference_mode_enabled"}));
  t.version = PyUnicode_InternFromString("_version");
  if (PyErr_Occurred() || !api || api->major != 1) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  t.describe = api->describe;
  torch_ = t;
  Py_RETURN_TRUE;
}

using Door = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Door door) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(door)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {{"open", open, METH_O, nullptr},
                         method("noisy_update", noisy_update),
                         method("noise_reduce", noise_reduce),
                         method("fill", fill),
                         method("draw_seed", draw_seed),
                         method("normalise", normalise),
                         method("activate", door_activate),
                         method("signed_stack", door_signed_stack),
                         method("project_stack", door_project_stack),
                         method("spread_stack", door_spread_stack),
                         method("normalise_stack", door_normalise_stack),
                         method("launches", launches),
                         method("serve", serve),
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace fastscore

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, fastscore::methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

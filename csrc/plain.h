// What the doors (door.cpp, door_stacks.cpp) take from Python: plain tensors, numbers, noise keys and coefficients, or the news that they are not plain.
#pragma once
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "direct.h"
#include "torch_cpu.h"

namespace fastscore {

// The table of functions in which PyTorch offers DLPack 1.
struct DLPackExchange {
  uint32_t major, minor;
  void *previous, *allocate, *from_python, *to_python;
  int (*describe)(void* object, DLTensor* out);
};

// A function of PyTorch of no argument or of one, entered in C where it says how.
struct Function {
  PyObject* object = nullptr;
  PyCFunction entry = nullptr;
  PyObject* self = nullptr;

  Function() = default;
  explicit Function(PyObject* o) : object(o) {
    if (!o || !PyCFunction_Check(o)) return;
    const int flags = PyCFunction_GetFlags(o);
    if (flags != METH_NOARGS && flags != METH_O) return;
    entry = PyCFunction_GetFunction(o);
    self = PyCFunction_GetSelf(o);
  }
  PyObject* operator()(PyObject* argument = nullptr) const {
    return entry ? entry(self, argument) : PyObject_CallFunctionObjArgs(object, argument, nullptr);
  }
};

// What is asked of PyTorch, looked up once.
struct Torch {
  int (*describe)(void*, DLTensor*);
  PyObject *tensor, *parameter, *empty, *empty_like, *float32, *int64, *cpu, *is_neg;
  PyObject *forward_ad, *level, *requires_grad, *new_empty, *sqrt, *dtype, *device, *version;
  Function increment_version, modes, function_modes, transforms, tracing, profiling, inference_mode;
};
inline Torch torch_{};   // of both

// Who runs what comes from Python for one kind of device: launches of CUDA C++, or Triton's launchers, a tuple in the order of `Launcher`.
struct Server {
  const Launches* launches;
  PyObject* launchers;
};
constexpr int32_t kCpu = 1, kCuda = 2;
inline Server servers_[1 + kCuda]{};   // nobody: of a CPU the door itself
enum Launcher : int { kUpdateLauncher, kReduceLauncher, kFillLauncher, kNormLauncher, kLaunchers };

namespace {

constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;
constexpr int64_t kInOneThread = 16 * 1024;   // elements: beyond them others may run Python meanwhile

PyObject* refused() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

// Owns a reference; null where the call behind it failed.
struct Ref {
  PyObject* o;
  explicit Ref(PyObject* object) : o(object) {}
  Ref(const Ref&) = delete;
  ~Ref() { Py_XDECREF(o); }
  explicit operator bool() const { return o != nullptr; }
};

bool is_false(const Ref& answer) { return answer.o == Py_False; }

bool says_false(const Function& function) { return is_false(Ref(function())); }

bool says_none(const Function& function) { return Ref(function()).o == Py_None; }

// Whether PyTorch would do nothing with a call but run the kernel.
bool nothing_between() {
  const Ref modes(torch_.modes());
  if (!modes || PyLong_AsLong(modes.o) != 0) return false;
  const Ref level(PyObject_GetAttr(torch_.forward_ad, torch_.level));
  if (!level || PyLong_AsLong(level.o) >= 0) return false;
  return says_none(torch_.transforms) && says_false(torch_.function_modes) && says_none(torch_.tracing) && says_false(torch_.profiling);
}

bool dtype_of(const DLTensor& t, DType& dtype) {
  if (t.lanes != 1) return false;
  if (t.code == kFloat && t.bits == 32) dtype = kFloat32;
  else if (t.code == kFloat && t.bits == 64) dtype = kFloat64;
  else if (t.code == kBfloat && t.bits == 16) dtype = kBFloat16;
  else if (t.code == kFloat && t.bits == 16) dtype = kFloat16;
  else if (t.code == kInt && t.bits == 64) dtype = kInt64;
  else return false;
  return true;
}

int64_t size_of(DType dtype) { return dtype == kFloat64 || dtype == kInt64 ? 8 : dtype == kFloat32 ? 4 : 2; }

struct View {
  DLTensor t;
  DType dtype;
  int64_t n;

  char* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
  int64_t batch() const { return t.ndim ? t.shape[0] : 1; }
  bool beside(const View& x) const { return t.device_type == x.t.device_type && t.device_id == x.t.device_id; }
  bool like(const View& x) const {
    return beside(x) && dtype == x.dtype && t.ndim == x.t.ndim && !std::memcmp(t.shape, x.t.shape, sizeof(int64_t) * t.ndim);
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int32_t d = t.ndim - 1; d >= 0; expected *= t.shape[d--])
      if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    return true;
  }
  bool lies_as(const View& x) const { return !std::memcmp(t.strides, x.t.strides, sizeof(int64_t) * t.ndim); }
  bool same_place(const View& x) const { return data() == x.data() && lies_as(x); }
  const char* end() const {
    int64_t last = 0;
    for (int32_t d = 0; d < t.ndim; ++d) last += (t.shape[d] - 1) * t.strides[d];
    return data() + (last + 1) * size_of(dtype);
  }
  bool overlaps(const View& x) const { return data() < x.end() && x.data() < end(); }

  // Whether no two elements share memory, so far as strides tell.
  bool writable() const { return extent() != 0; }

  // Whether it fills its memory, in whatever order, with one sample after another.
  bool dense() const { return extent() == n && (t.ndim == 0 || t.shape[0] == 1 || t.strides[0] == n / t.shape[0]); }

  // Elements from the first in memory to the last; 0 where two of them share memory.
  int64_t extent() const {
    int64_t extent = 1;
    bool done[kMaxDims] = {};
    for (int32_t k = 0; k < t.ndim; ++k) {
      int32_t least = -1;
      for (int32_t d = 0; d < t.ndim; ++d)
        if (!done[d] && (least < 0 || t.strides[d] < t.strides[least])) least = d;
      done[least] = true;
      if (t.shape[least] == 1) continue;
      if (t.strides[least] < extent) return 0;
      extent += t.strides[least] * (t.shape[least] - 1);
    }
    return extent;
  }
};

// Who runs the calls of a tensor; null: the CPU's own kernels.
const Server* server_of(const View& v) {
  const Server& server = servers_[v.t.device_type];
  return server.launches || server.launchers ? &server : nullptr;
}

// A tensor with memory, one element at least and no gradient to lose, on the CPU or another device that is served.
bool look_anywhere(PyObject* o, View& v) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(o));
  if (type != torch_.tensor && type != torch_.parameter) return false;
  if (aoti_torch_grad_mode_is_enabled() && !is_false(Ref(PyObject_GetAttr(o, torch_.requires_grad)))) return false;
  if (torch_.describe(o, &v.t) != 0 || !v.t.data || v.t.ndim > kMaxDims || !dtype_of(v.t, v.dtype)) return false;
  if (v.t.device_type != kCpu && (v.t.device_type != kCuda || !server_of(v))) return false;
  v.n = 1;
  for (int32_t d = 0; d < v.t.ndim; ++d) v.n *= v.t.shape[d];
  return v.n > 0 && is_false(Ref(PyObject_CallFunctionObjArgs(torch_.is_neg, o, nullptr)));
}

// The same on the CPU, whose values may be read.
bool look(PyObject* o, View& v) { return look_anywhere(o, v) && v.t.device_type == kCpu; }

bool look_float(PyObject* o, View& v) { return look(o, v) && v.dtype != kInt64; }

bool look_float_anywhere(PyObject* o, View& v) { return look_anywhere(o, v) && v.dtype != kInt64; }

// A tensor that PyTorch has just made, so that nothing about it is in doubt but whether it is of a device that is served.
bool look_made(PyObject* o, View& v) {
  if (!o || torch_.describe(o, &v.t) != 0 || !v.t.data || v.t.ndim > kMaxDims || !dtype_of(v.t, v.dtype)) return false;
  if (v.t.device_type != kCpu && (v.t.device_type != kCuda || !server_of(v))) return false;
  v.n = 1;
  for (int32_t d = 0; d < v.t.ndim; ++d) v.n *= v.t.shape[d];
  return v.n > 0;
}

// A tensor to write the result of x into, or a new one; null where out does not do.
PyObject* destination(PyObject* out, PyObject* like, const View& x, View& v) {
  if (out == Py_None) {
    PyObject* made = PyObject_CallFunctionObjArgs(torch_.empty_like, like, nullptr);
    if (look_made(made, v) && v.beside(x)) return made;
    Py_XDECREF(made);
    return nullptr;
  }
  if (!look_anywhere(out, v) || !v.like(x) || !v.writable()) return nullptr;
  // An inference tensor, which is written to in inference mode alone, has no version.
  if (says_false(torch_.inference_mode) && !Ref(PyObject_GetAttr(out, torch_.version))) return nullptr;
  Py_INCREF(out);
  return out;
}

// Autograd must see that a tensor has been written to.
bool written(PyObject* out) {
  const Ref one(PyTuple_Pack(1, out));
  return one && Ref(torch_.increment_version(one.o));
}

bool integer(PyObject* o, int64_t least, int64_t most, int64_t& value) {
  if (!PyLong_CheckExact(o)) return false;
  value = PyLong_AsLongLong(o);
  return !(value == -1 && PyErr_Occurred()) && least <= value && value <= most;
}

// An int of 63 bits from PyTorch's generator of the CPU, as torch.randint(0, 2**63 - 1, ()) draws it.
bool draw(int64_t& seed) {
  int32_t dtype = aoti_torch_dtype_int64(), device = aoti_torch_device_type_cpu();
  AtenTensorHandle drawn = nullptr;
  void* p = nullptr;
  PyThreadState* state = PyEval_SaveThread();   // another thread may have the generator for long
  const bool done = !aoti_torch_cpu_randint_low(0, INT64_MAX, nullptr, 0, &dtype, nullptr, &device, 0, nullptr, &drawn) &&
                    !aoti_torch_get_data_ptr(drawn, &p);
  PyEval_RestoreThread(state);
  if (done) seed = *static_cast<int64_t*>(p);
  if (drawn) aoti_torch_delete_tensor_object(drawn);
  return done;
}

void set_seed(NoiseKey& key, uint64_t seed) {
  key.k0 = static_cast<uint32_t>(seed);
  key.k1 = static_cast<uint32_t>(seed >> 32);
}

// The seed of a call that has none. It comes last: a call that is refused must not have drawn.
bool seeded(PyObject* seed, NoiseKey& key) {
  int64_t drawn;
  if (seed != Py_None) return true;
  if (!draw(drawn)) return false;
  set_seed(key, drawn);
  return true;
}

// All of a key but a seed that is None.
bool read_open_key(PyObject* seed, PyObject* step, PyObject* stream, int64_t substream, PyObject* offset, NoiseKey& key) {
  int64_t word, first;
  if (!(seed == Py_None || PyLong_CheckExact(seed)) || !PyLong_CheckExact(step)) return false;
  if (!integer(stream, 1, 65535, word) || !integer(offset, 0, INT64_MAX, first)) return false;
  key = {0, 0, static_cast<uint32_t>(PyLong_AsUnsignedLongLongMask(step)), static_cast<uint32_t>(word | substream << 16),
         static_cast<uint64_t>(first)};
  if (seed != Py_None) set_seed(key, PyLong_AsUnsignedLongLongMask(seed));
  return true;
}

bool read_key(PyObject* seed, PyObject* step, PyObject* stream, int64_t substream, PyObject* offset, NoiseKey& key) {
  return seed != Py_None && read_open_key(seed, step, stream, substream, offset, key);
}

// A coefficient: one number, or one for each sample in the compute type.
struct Coefficient {
  double number = 0;
  std::vector<double> memory;   // of `each`, whatever the compute type
  bool each = false;

  template <class A> A* values() { return reinterpret_cast<A*>(memory.data()); }
  const void* pointer() const { return each ? memory.data() : nullptr; }
};

template <class A>
bool read_values(const View& v, double least, Coefficient& c) {
  const A* from = reinterpret_cast<const A*>(v.data());
  const int64_t stride = v.t.ndim ? v.t.strides[0] : 0;
  c.each = v.n > 1;
  if (c.each) c.memory.resize((v.n * sizeof(A) + 7) / 8);
  for (int64_t i = 0; i < v.n; ++i) {
    const A value = from[i * stride];
    if (!(value >= least && std::isfinite(value))) return false;   // false for NaN
    if (c.each) c.values<A>()[i] = value;
    else c.number = value;
  }
  return true;
}

bool read_coefficient(PyObject* o, const View& x, double least, Coefficient& c) {
  if (PyFloat_CheckExact(o) || PyLong_CheckExact(o)) {
    c.number = PyFloat_AsDouble(o);
    return !(c.number == -1 && PyErr_Occurred()) && c.number >= least && std::fabs(c.number) <= __FLT_MAX__;
  }
  View v;
  const DType compute = x.dtype == kFloat64 ? kFloat64 : kFloat32;
  if (!look(o, v) || v.dtype != compute || v.t.ndim > 1 || (v.t.ndim == 1 && v.n != x.batch())) return false;
  return compute == kFloat64 ? read_values<double>(v, least, c) : read_values<float>(v, least, c);
}

template <class A>
void halve(Coefficient& c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) c.values<A>()[i] *= A(0.5);
}

// Drift e/2 and diffusion sqrt(e) of a Langevin step. The root of a tensor is PyTorch's, which is not always the nearest number.
bool halve(PyObject* given, const View& x, Coefficient& drift, Coefficient& diffusion) {
  if (PyFloat_CheckExact(given) || PyLong_CheckExact(given)) {
    diffusion.number = std::sqrt(drift.number);
  } else {
    const Ref root(PyObject_CallMethodObjArgs(given, torch_.sqrt, nullptr));
    if (!root || !read_coefficient(root.o, x, 0, diffusion)) return false;
  }
  drift.number *= 0.5;
  if (drift.each) x.dtype == kFloat64 ? halve<double>(drift, x.batch()) : halve<float>(drift, x.batch());
  return true;
}

Nest nest_of(const View& out, const View* a, const View* b) {
  const int64_t* strides[kMaxTensors] = {out.t.strides, a ? a->t.strides : nullptr, b ? b->t.strides : nullptr};
  return ::fastscore::nest_of(out.t.ndim, out.t.shape, strides);
}

template <class F>
void without_python(int64_t n, const F& f) {
  if (n <= kInOneThread) return f();
  PyThreadState* state = PyEval_SaveThread();
  f();
  PyEval_RestoreThread(state);
}

}  // namespace
}  // namespace fastscore

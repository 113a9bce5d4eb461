// Calls of door.cpp on tensors of a device that somebody else serves (plain.h, Server). Their values are not looked at: a GPU would have to
// be waited for, and the checked way does not, either.
#pragma once
#include <exception>
#include <string>

#include "plain.h"
#include "random.h"

#define FS_APART __attribute__((noinline))   // their frames are not for calls on the CPU

namespace fastscore {
namespace {

// A coefficient that stays where it is.
struct ServedCoefficient {
  PyObject* tensor = Py_None;
  View view;
  double number = 0;

  bool is_tensor() const { return tensor != Py_None; }
  DirectCoefficient direct() const { return {is_tensor() ? &view.t : nullptr, number}; }
  bool tiny() const { return number != 0 && std::fabs(number) < __FLT_MIN__; }   // Triton's launch would lose it
};

bool read_served(PyObject* o, const View& x, double least, ServedCoefficient& c) {
  if (PyFloat_CheckExact(o) || PyLong_CheckExact(o)) {
    Coefficient plain;
    if (!read_coefficient(o, x, least, plain)) return false;
    c.number = plain.number;
    return true;
  }
  c.tensor = o;
  const DType compute = x.dtype == kFloat64 ? kFloat64 : kFloat32;
  if (!look_anywhere(o, c.view) || !c.view.beside(x) || c.view.dtype != compute || !c.view.contiguous()) return false;
  return c.view.t.ndim == 0 || (c.view.t.ndim == 1 && c.view.n == x.batch());
}

// All that a launch of Triton's depends on but addresses, and the numbers that it does not specialise on.
class Signature {
 public:
  template <class T>
  void add(T value) {
    std::memcpy(bytes_ + size_, &value, sizeof(T));
    size_ += sizeof(T);
  }
  void add_place(const View& v) { add(reinterpret_cast<uintptr_t>(v.data()) % 16 == 0); }
  void add(const View& v) {
    add(v.t.device_id), add(v.dtype), add(v.t.ndim), add_place(v);
    for (int32_t d = 0; d < v.t.ndim; ++d) add(v.t.shape[d]);
  }
  void add(const ServedCoefficient& c) {
    add(c.is_tensor()), add(c.is_tensor() && c.view.n > 1);
    if (c.is_tensor()) add_place(c.view);
  }
  PyObject* object() const { return PyBytes_FromStringAndSize(bytes_, size_); }

 private:
  char bytes_[64 + 8 * kMaxDims + 8 * kMaxTensors];
  Py_ssize_t size_ = 0;
};

int64_t seed_of(const NoiseKey& key) { return static_cast<int64_t>(static_cast<uint64_t>(key.k1) << 32 | key.k0); }

// launcher(*arguments), of which it takes the reference; whether it came to its end.
bool launched_by(const Server& server, Launcher which, PyObject* arguments) {
  const Ref given(arguments);
  return given && Ref(PyObject_CallObject(PyTuple_GetItem(server.launchers, which), given.o));
}

// A launch of CUDA C++, which waits where the GPU's queue is full; false, and Python's error, where it failed.
template <class F>
bool launched(const F& f) {
  PyThreadState* state = PyEval_SaveThread();
  std::string fault;
  try {
    f();
  } catch (const std::exception& error) {
    fault = error.what();
    if (fault.empty()) fault = "fastscore: a launch failed";
  }
  PyEval_RestoreThread(state);
  if (fault.empty()) return true;
  PyErr_SetString(PyExc_RuntimeError, fault.c_str());
  return false;
}

// x + a d + b z for noisy_update(); of a Langevin step `drift` is its step size and is a number.
FS_APART PyObject* served_update(Server server, PyObject* const* args, bool langevin, double least, const View* x, const View* d,
                                 NoiseKey key) {
  const View& like = x ? *x : *d;
  ServedCoefficient drift, diffusion;
  if (!read_served(args[3], like, least, drift)) return refused();
  if (langevin) {
    if (drift.is_tensor()) return refused();   // its half and its root are PyTorch's
    diffusion.number = std::sqrt(drift.number);
    drift.number *= 0.5;
  } else if (!read_served(args[4], like, least, diffusion)) {
    return refused();
  }
  const bool dense = (!x || x->contiguous()) && (!d || d->contiguous());
  if (!server.launches && (like.dtype == kFloat64 || !dense || drift.tiny() || diffusion.tiny())) return refused();

  View out;
  const Ref result(destination(args[9], x ? args[1] : args[2], like, out));
  if (!result || (!server.launches && !out.contiguous())) return refused();
  if (args[9] != Py_None) {
    for (const View* t : {x, d})
      if (t && !out.same_place(*t) && out.overlaps(*t)) return refused();
    for (const ServedCoefficient* c : {&drift, &diffusion})
      if (c->is_tensor() && out.overlaps(c->view)) return refused();
  }
  if (!seeded(args[5], key)) return refused();

  if (server.launches) {
    const DLTensor *x_t = x ? &x->t : nullptr, *d_t = d ? &d->t : nullptr;
    const auto launch = [&] { server.launches->noisy_update(out.t, like.dtype, x_t, d_t, drift.direct(), diffusion.direct(), key); };
    if (!launched(launch)) return nullptr;
  } else {
    Signature s;
    s.add('u'), s.add(out);
    for (const View* t : {x, d}) {
      s.add(t != nullptr);
      if (t) s.add_place(*t);
    }
    s.add(drift), s.add(diffusion), s.add(key.stream), s.add(key.offset);
    PyObject* given = Py_BuildValue("(NOOOOdOdLIIK)", s.object(), result.o, args[1], args[2], drift.tensor, drift.number, diffusion.tensor,
                                    diffusion.number, seed_of(key), key.step, key.stream, key.offset);
    if (!launched_by(server, kUpdateLauncher, given)) return nullptr;
  }
  if (args[9] != Py_None && !written(args[9])) return nullptr;
  Py_INCREF(result.o);
  return result.o;
}

// The sums of noise_reduce(), whose result has been made.
FS_APART PyObject* served_reduce(Server server, PyObject* const* args, const View& score, PyObject* result, const View& out,
                                 const NoiseKey& key) {
  const int reduction = static_cast<int>(PyLong_AsLong(args[0]));
  ServedCoefficient sigma;
  if (!read_served(args[2], score, 0, sigma) || !out.beside(score)) return refused();
  if (server.launches) {
    bool done = false;
    if (!launched([&] { done = server.launches->noise_reduce(out.t, score.dtype, score.t, sigma.direct(), key, reduction); })) return nullptr;
    if (!done) return refused();
  } else {
    if (score.dtype == kFloat64 || !score.contiguous() || sigma.tiny()) return refused();
    Signature s;
    s.add('r'), s.add(score), s.add_place(out), s.add(sigma), s.add(key.stream), s.add(key.offset), s.add(reduction);
    PyObject* given = Py_BuildValue("(NOOOdLIIKi)", s.object(), result, args[1], sigma.tensor, sigma.number, seed_of(key), key.step, key.stream,
                                    key.offset, reduction);
    if (!launched_by(server, kReduceLauncher, given)) return nullptr;
  }
  Py_INCREF(result);
  return result;
}

FS_APART PyObject* served_fill(Server server, FillKind kind, PyObject* result, const View& out, const NoiseKey& key) {
  if (server.launches) {
    if (!launched([&] { server.launches->fill(out.t, out.dtype, kind, key); })) return nullptr;
  } else {
    PyObject* given = Py_BuildValue("(OiOLIIK)", result, static_cast<int>(kind), Py_None, seed_of(key), key.step, key.stream, key.offset);
    if (!launched_by(server, kFillLauncher, given)) return nullptr;
  }
  Py_INCREF(result);
  return result;
}

}  // namespace
}  // namespace fastscore

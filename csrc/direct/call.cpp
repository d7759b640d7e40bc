#include "call.h"

#include <cmath>
#include <new>
#include <string>

namespace tt::direct {

namespace {

// What is asked of PyTorch before a call, and for its result.
struct Surroundings {
    PyObject* parameter = nullptr;  // the class
    PyObject* states = nullptr;  // a tuple of functions: each answers with something false where nothing lies between
    PyObject* forward_ad = nullptr;    // the variables of torch.autograd.forward_ad: _current_level is -1 outside of it
    PyObject* level = nullptr;         // that name
    PyObject* outside = nullptr;       // -1
    PyObject* grad_enabled = nullptr;  // a function
    PyObject* increment = nullptr;     // torch.autograd.graph.increment_version
    PyObject *is_cpu, *is_neg, *is_inference, *requires_grad, *new_empty, *dtype_name;
    bool known = false, wanted = true;
};
Surroundings& surroundings() {
    static Surroundings found;
    return found;
}

// Whether an object, stolen, is true; so is what failed.
bool truth(PyObject* stolen) {
    if (stolen == nullptr) {
        PyErr_Clear();
        return true;
    }
    const int is_true = stolen == Py_False || stolen == Py_None ? 0 : PyObject_IsTrue(stolen);
    Py_DECREF(stolen);
    if (is_true < 0) PyErr_Clear();
    return is_true != 0;
}

bool nothing_between() {
    const Surroundings& around = surroundings();
    if (!around.known || !around.wanted) return false;
    if (PyDict_GetItem(around.forward_ad, around.level) != around.outside) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(around.states); ++i)
        if (truth(PyObject_CallNoArgs(PyTuple_GET_ITEM(around.states, i)))) return false;
    return true;
}

}  // namespace

Call::Call()
    : direct_(nothing_between()), gradients_(direct_ && truth(PyObject_CallNoArgs(surroundings().grad_enabled))) {}

bool Call::is_plain(PyObject* object) {
    const Surroundings& around = surroundings();
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != torch().tensor && type != around.parameter) return false;
    if (first_ && !truth(PyObject_GetAttr(object, around.is_cpu))) return false;
    first_ = false;  // what follows must lie on the CPU, too, which its layout says
    return !truth(PyObject_CallMethodNoArgs(object, around.is_neg)) &&
           !(gradients_ && truth(PyObject_GetAttr(object, around.requires_grad)));
}

bool Call::required(View& view, PyObject* object) {
    return is_plain(object) && is_placed(view, object);
}

bool is_placed(View& view, PyObject* tensor) {
    DlTensor found;
    if (!exchanged(tensor, found) || found.device.type != dl_cpu || found.ndim > View::max_dims) return false;
    if (!known_dtype(found.dtype, view.dtype)) return false;
    view.data = static_cast<char*>(found.data) + found.byte_offset, view.ndim = found.ndim;
    int64_t count = 1;
    for (int i = 0; i < found.ndim; ++i) {
        view.size[i] = found.shape[i], view.stride[i] = found.strides[i];
        count *= found.shape[i];
    }
    const int last = view.ndim - 1;
    return count > 0 && found.data != nullptr && (last < 0 || view.size[last] == 1 || view.stride[last] == 1);
}

bool has_shape(const View& view, std::initializer_list<int64_t> sizes) {
    if (view.ndim != int(sizes.size())) return false;
    int i = 0;
    for (const int64_t size : sizes)
        if (view.size[i++] != size) return false;
    return true;
}

bool is_whole(PyObject* object, int64_t& value) {
    if (!PyLong_CheckExact(object)) return false;
    int overflow = 0;
    value = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow == 0;
}
bool is_real(PyObject* object, double& value) {
    if (!PyFloat_CheckExact(object)) return false;
    value = PyFloat_AS_DOUBLE(object);
    return std::isfinite(value);
}

bool is_one_of(PyObject* object, const char* first, const char* other, bool& second) {
    if (!PyUnicode_Check(object)) return false;
    second = PyUnicode_CompareWithASCIIString(object, other) == 0;
    return second || PyUnicode_CompareWithASCIIString(object, first) == 0;
}

bool flatten(View& view) {
    if (view.ndim < 1) return false;
    const int64_t width = view.size[view.ndim - 1];
    int64_t rows, row;
    if (!find_rows(view.ndim, view.size, view.stride, rows, row)) return false;
    view.ndim = 2;
    view.size[0] = rows, view.size[1] = width;
    view.stride[0] = row, view.stride[1] = 1;
    return true;
}

bool as_rows(View& view) {
    if (view.ndim == 3) return true;
    if (!flatten(view)) return false;
    add_dimension(view);
    return true;
}

// PyTorch reads numbers faster than a tuple of them.
PyObject* new_empty(PyObject* like, const int64_t* sizes, int count, const DType* dtype) {
    const Surroundings& around = surroundings();
    PyObject* arguments[View::max_dims + 2] = {like};
    for (int i = 0; i < count; ++i) arguments[i + 1] = PyLong_FromLongLong(sizes[i]);
    if (dtype != nullptr) arguments[count + 1] = PyTuple_GET_ITEM(torch().dtypes, static_cast<int>(*dtype));
    PyObject* made = PyObject_VectorcallMethod(around.new_empty, arguments, count + 1,
                                               dtype == nullptr ? nullptr : around.dtype_name);
    for (int i = 0; i < count; ++i) Py_XDECREF(arguments[i + 1]);
    return made;
}

PyObject* pair(PyObject* first, PyObject* second) {
    if (first != nullptr && second != nullptr) return Py_BuildValue("(NN)", first, second);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return nullptr;
}

bool was_written(PyObject* tensor) {
    if (truth(PyObject_CallMethodNoArgs(tensor, surroundings().is_inference))) return true;
    PyObject* done = PyObject_CallOneArg(surroundings().increment, tensor);
    Py_XDECREF(done);
    return done != nullptr;
}

bool run(void (*kernel)(const void*), const void* what) {
    PyThreadState* released = PyEval_SaveThread();
    bool no_memory = false;
    std::string failed;
    try {
        kernel(what);
    } catch (const std::bad_alloc&) {
        no_memory = true;
    } catch (const std::exception& error) {
        failed = std::string("kernel failed: ") + error.what();
    }
    PyEval_RestoreThread(released);
    if (no_memory) PyErr_NoMemory();
    if (!failed.empty()) PyErr_SetString(PyExc_RuntimeError, failed.c_str());
    return !no_memory && failed.empty();
}

namespace {

// Whether an operator's kernel may be called with these arguments, without the dispatcher. The first number has a bit
// for every one of them that is a tensor or None. Without any tensor, the dispatcher has something to say.
PyObject* is_direct(PyObject*, Arguments given, Py_ssize_t count) {
    Call call;
    int64_t tensors = 0;
    bool any = false;
    if (!call || count < 1 || !is_whole(given[0], tensors)) Py_RETURN_FALSE;
    for (Py_ssize_t i = 1; i < count; ++i) {
        PyObject* object = given[i];
        if (object == Py_None) continue;
        if (tensors >> (i - 1) & 1) {
            DlTensor found;
            if (!call.is_plain(object) || !exchanged(object, found) || found.device.type != dl_cpu) Py_RETURN_FALSE;
            any = true;
        } else if (!PyLong_CheckExact(object) && !PyFloat_CheckExact(object) && !PyBool_Check(object) &&
                   !PyUnicode_CheckExact(object) && !PyTuple_CheckExact(object) && !PyList_CheckExact(object)) {
            Py_RETURN_FALSE;
        }
    }
    if (any) Py_RETURN_TRUE;
    Py_RETURN_FALSE;
}

// Whether nothing of PyTorch lies between public functions and kernels, whatever their arguments.
PyObject* is_open(PyObject*, Arguments, Py_ssize_t) {
    if (nothing_between()) Py_RETURN_TRUE;
    Py_RETURN_FALSE;
}

PyMethodDef own_entries[] = {
    TT_ENTRY(is_open, "Whether nothing of PyTorch lies between plain calls and their kernels"),
    TT_ENTRY(is_direct, "Whether nothing of PyTorch lies between an operator with these arguments and its kernel"),
    TT_LAST_ENTRY,
};

}  // namespace

void bind(py::module_& m) {
    py::module_ direct = m.def_submodule("direct");
    for (PyMethodDef* entries : {own_entries, adaln_entries, attention_entries, linear_entries, moe_entries})
        if (PyModule_AddFunctions(direct.ptr(), entries) != 0) throw py::error_already_set();
    direct.def("set", [](bool wanted) { surroundings().wanted = wanted; });
    m.def("set_torch", [](const py::object& tensor, const py::object& parameter, const py::tuple& dtypes,
                          const py::object& exchange, const py::tuple& states, const py::object& grad_enabled,
                          const py::object& increment, const py::dict& forward_ad) {
        if (dtypes.size() != static_cast<size_t>(DType::float8) + 1)
            throw py::value_error("set_torch: expected a dtype for each that the kernels know");
        const auto kept = [](const py::object& object) { return py::object(object).release().ptr(); };
        Torch& known = torch();
        known.tensor = kept(tensor), known.dtypes = kept(dtypes);
        if (exchange.is_none()) return;
        const auto* table = static_cast<const DlExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
        if (table == nullptr) throw py::error_already_set();
        if (table->version.major != 1 || table->tensor_from_object == nullptr) return;
        Surroundings& around = surroundings();
        around.parameter = kept(parameter), around.states = kept(states), around.grad_enabled = kept(grad_enabled),
        around.increment = kept(increment);
        around.forward_ad = kept(forward_ad), around.outside = PyLong_FromLong(-1);
        around.level = PyUnicode_InternFromString("_current_level");
        around.is_cpu = PyUnicode_InternFromString("is_cpu");
        around.is_inference = PyUnicode_InternFromString("is_inference");
        around.is_neg = PyUnicode_InternFromString("is_neg");
        around.requires_grad = PyUnicode_InternFromString("requires_grad");
        around.new_empty = PyUnicode_InternFromString("new_empty");
        around.dtype_name = kept(py::make_tuple("dtype"));
        around.known = true;
        known.exchange = table;
    });
}

}  // namespace tt::direct

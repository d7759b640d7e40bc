#include "recording.h"

#include <stdexcept>
#include <string>

#include "tensors.h"

namespace tt {

Recording*& Recording::now() {
    static thread_local Recording* recording = nullptr;
    return recording;
}

void Recording::add_storage(const View& storage) {
    storage_.push_back(storage);
}

void Recording::note_use(const View& view, size_t at) {
    if (view.data == nullptr) return;
    for (size_t i = 0; i < storage_.size(); ++i)
        if (storage_[i].data == view.data) uses_.push_back({i, at});
}

void Recording::move_storage(size_t number, const View& storage) {
    for (const Use& use : uses_)
        if (use.storage == number) std::memcpy(&words_[use.view], &storage, sizeof(View));
    storage_.at(number) = storage;
}

void Recording::run(size_t first, size_t last) const {
    for (size_t i = first; i < last; ++i) calls_[i].run(&words_[calls_[i].arguments]);
}

Places::Place Places::place_of(PyObject* object) {
    if (!is_tensor(object)) return {object, DType::float32, -1, 0};
    const Layout layout(object);
    uint64_t hash = 0;
    for (int i = 0; i < layout.rank; ++i)
        for (const int64_t number : {layout.size[i], layout.stride[i]})
            hash = hash * 0x9e3779b97f4a7c15u + uint64_t(number);
    return {layout.data, layout.dtype, layout.rank, int64_t(hash)};
}

bool Places::changed() {
    bool changed = false;
    size_t found = 0;
    for (const py::handle dict : dicts_) {
        PyObject *name, *value;
        for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &name, &value); ++found) {
            if (value == Py_None) continue;
            const Place place = place_of(value);
            if (found < places_.size() && !(places_[found] != place)) continue;
            changed = true;
            if (found >= places_.size()) places_.resize(found + 1);
            places_[found] = place;
            if (place.rank < 0) others_.push_back(py::reinterpret_borrow<py::object>(value));
        }
    }
    changed |= found != places_.size();
    places_.resize(found);
    return changed;
}

void bind_recording(py::module_& m) {
    py::class_<Recording>(m, "Recording", py::module_local(), "Calls of kernels, noted to be run again.")
        .def(py::init<>())
        .def("__len__", &Recording::size)
        .def("add_storage", [](Recording& r, Strided storage) { r.add_storage(storage); })
        .def("move_storage", [](Recording& r, size_t number, Strided storage) { r.move_storage(number, storage); })
        .def("begin",
             [](Recording& r) {
                 if (Recording::now() != nullptr) throw std::runtime_error("this thread records already");
                 Recording::now() = &r;
             })
        .def("end", [](Recording&) { Recording::now() = nullptr; })
        .def(
            "run",
            [](const Recording& r, size_t first, size_t last) {
                if (first > last || last > r.size())
                    throw py::index_error("expected calls among " + std::to_string(r.size()));
                py::gil_scoped_release released;
                r.run(first, last);
            },
            py::arg("first"), py::arg("last"));
    py::class_<Places>(m, "Places", py::module_local(), "Where the tensors in some dictionaries lie.")
        .def(py::init<const py::list&>())
        .def("changed", &Places::changed);
    m.def("is_recording", [] { return Recording::now() != nullptr; });
}

}  // namespace tt

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

void bind_recording(py::module_& m) {
    py::class_<Recording>(m, "Recording", "Calls of kernels, noted to be run again.")
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
    m.def("is_recording", [] { return Recording::now() != nullptr; });
}

}  // namespace tt

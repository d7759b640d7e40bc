// Calls of kernels that are noted and run again, all by one call: a step of a model without Python between its kernels.
//
// While a thread records, every kernel that Python calls in it is noted and not run. What is noted is the kernel and
// its struct of arguments, plain data that says where tensors lie; whoever records sees to it that they lie there for
// as long as the recording is run. The instruction set and the threads are those of each run.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/view.h"

namespace tt {

// The views of storage that may move to another place, with more room, from one run to the next.
template <class Arguments, class Visit>
void visit_storage(Arguments&, const Visit&) {}
template <class Visit>
void visit_storage(BlockAttention& a, const Visit& visit) {
    visit(a.k_context);
    visit(a.v_context);
}
template <class Visit>
void visit_storage(AppendKv& a, const Visit& visit) {
    visit(a.k_context);
    visit(a.v_context);
}

class Recording {
   public:
    static Recording*& now();  // what this thread records, or null

    // Storage that may move; known by its place from here on, which must be one of its own. Before any call is noted.
    void add_storage(const View& storage);
    // Where one lies from now on, they being counted in the order in which they were added.
    void move_storage(size_t number, const View& storage);

    template <class Arguments>
    void add(void (*run)(const void*), const Arguments& arguments) {
        static_assert(std::is_trivially_copyable_v<Arguments> && alignof(Arguments) <= alignof(uint64_t));
        constexpr size_t size = (sizeof(Arguments) + sizeof(uint64_t) - 1) / sizeof(uint64_t);
        const size_t at = words_.size();
        words_.resize(at + size);
        std::memcpy(&words_[at], &arguments, sizeof(Arguments));
        calls_.push_back({run, at});
        Arguments copy = arguments;
        visit_storage(copy, [&](View& view) {
            const size_t offset = size_t(reinterpret_cast<char*>(&view) - reinterpret_cast<char*>(&copy));
            note_use(view, at + offset / sizeof(uint64_t));
        });
    }

    void keep(const pybind11::object& owner) { kept_.push_back(owner); }  // as long as this
    size_t size() const { return calls_.size(); }
    // Calls [first, last), in order. What a kernel throws ends it.
    void run(size_t first, size_t last) const;

   private:
    struct Call {
        void (*run)(const void*);
        size_t arguments;  // where they begin
    };
    struct Use {
        size_t storage, view;  // its number, and where its view stands
    };
    void note_use(const View& view, size_t at);
    std::vector<Call> calls_;
    std::vector<uint64_t> words_;  // the arguments of all calls, one struct behind the other
    std::vector<View> storage_;
    std::vector<Use> uses_;
    std::vector<pybind11::object> kept_;
};

// The tensors in some dictionaries, by where they lie, and whatever else is in them. It keeps the dictionaries.
class Places {
   public:
    explicit Places(const pybind11::list& dicts) : dicts_(dicts) { changed(); }
    // Whether anything lies elsewhere, or is another thing, than when this was asked for the last time.
    bool changed();

   private:
    struct Place {
        const void* data;  // of what is no tensor, the object
        DType dtype;
        int rank;
        int64_t layout;  // sizes and strides, hashed
        bool operator!=(const Place& other) const {
            return data != other.data || dtype != other.dtype || rank != other.rank || layout != other.layout;
        }
    };
    static Place place_of(PyObject* object);
    pybind11::list dicts_;
    std::vector<Place> places_;
    std::vector<pybind11::object> others_;  // what is no tensor, so that nothing new is made in its place
};

template <class Kernel>
struct ArgumentsOf;
template <class Arguments>
struct ArgumentsOf<void (*)(const Arguments&)> {
    using type = Arguments;
};

// Calls a kernel, or notes the call where this thread records.
template <auto kernel>
void called(const typename ArgumentsOf<decltype(kernel)>::type& arguments) {
    using Arguments = typename ArgumentsOf<decltype(kernel)>::type;
    if (Recording* recording = Recording::now())
        recording->add([](const void* noted) { kernel(*static_cast<const Arguments*>(noted)); }, arguments);
    else
        kernel(arguments);
}

void bind_recording(pybind11::module_& m);

}  // namespace tt

// A CUDA driver for machines without one: it launches nothing, and says what it was asked to launch. Everything else
// that cuda-python asks of a driver succeeds and does nothing.
#include <cstdint>
#include <cstdio>
#include <cstring>

using Result = int;

struct Attribute {  // CUlaunchAttribute
    int id;
    char gap[4];
    union {
        int number;
        char room[64];
    } value;
};
struct Config {  // CUlaunchConfig
    unsigned grid[3], block[3], shared;
    void* stream;
    const Attribute* attributes;
    unsigned attribute_count;
};

static char thing;  // what every handle points to

static Result fine() {
    return 0;
}
static Result version(int* number) {
    *number = 13000;
    return 0;
}
static Result count(int* devices) {
    *devices = 1;
    return 0;
}
static Result device(int* found, int ordinal) {
    *found = ordinal;
    return 0;
}
static Result attribute(int* value, int name, int ordinal) {
    enum { major = 75 };
    *value = name == major ? 9 : 0;
    return 0;
}
static Result handle(void** found) {
    *found = &thing;
    return 0;
}
static Result current(void* context) {
    std::printf("current %s\n", context == &thing ? "context" : "nothing");
    return fine();
}
static Result load(void** library, const char* code) {
    std::printf("load %.3s\n", code + 1);
    return handle(library);
}
static Result kernel(void** found, void* library, const char* name) {
    std::printf("kernel %s\n", name);
    return handle(found);
}
static Result launch(const Config* config, void* function, void** arguments) {
    std::printf("launch %u blocks of %u threads, %u bytes, stream %p", config->grid[0], config->block[0],
                config->shared, config->stream);
    for (unsigned i = 0; i < config->attribute_count; i++)
        std::printf(", attribute %d = %d", config->attributes[i].id, config->attributes[i].value.number);
    std::printf(":");
    for (int i = 0; i < 5; i++) std::printf(" %llx", *static_cast<unsigned long long*>(arguments[i]));
    std::printf("\n");
    return std::fflush(stdout);
}

static const struct {
    const char* name;
    void* function;
} known[] = {
#define KNOWN(name, function) {name, reinterpret_cast<void*>(function)}
    KNOWN("cuDriverGetVersion", version),
    KNOWN("cuDeviceGetCount", count),
    KNOWN("cuDeviceGet", device),
    KNOWN("cuDeviceGetAttribute", attribute),
    KNOWN("cuDevicePrimaryCtxRetain", handle),
    KNOWN("cuCtxGetCurrent", handle),
    KNOWN("cuCtxSetCurrent", current),
    KNOWN("cuLibraryLoadData", load),
    KNOWN("cuLibraryGetKernel", kernel),
    KNOWN("cuKernelGetFunction", handle),
    KNOWN("cuLaunchKernelEx", launch),
};

extern "C" Result cuGetProcAddress_v2(const char* name, void** function, int, std::uint64_t, int* status) {
    *function = reinterpret_cast<void*>(fine);
    if (!std::strcmp(name, "cuGetProcAddress")) *function = reinterpret_cast<void*>(cuGetProcAddress_v2);
    for (const auto& one : known)
        if (!std::strcmp(name, one.name)) *function = one.function;
    if (status) *status = 0;
    return 0;
}

// A plain read of memory by all threads, each its own share.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <thread>
#include <vector>

static uint64_t *data;
static size_t words;
static volatile uint64_t sink;

static void in_threads(int threads, void (*work)(uint64_t *, size_t)) {
    std::vector<std::thread> running;
    size_t share = words / threads;
    for (int t = 0; t < threads; ++t) running.emplace_back(work, data + t * share, share);
    for (auto &thread : running) thread.join();
}

static void write(uint64_t *from, size_t count) { memset(from, 1, count * sizeof *from); }

static void read(uint64_t *from, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; ++i) sum += from[i];
    sink = sum;
}

// Large pages where the kernel gives them; written by the threads that read.
extern "C" int allocate(size_t bytes, int threads) {
    words = bytes / sizeof *data;
    data = static_cast<uint64_t *>(aligned_alloc(2 << 20, bytes));
    if (!data) return 1;
    madvise(data, bytes, MADV_HUGEPAGE);
    in_threads(threads, write);
    return 0;
}

extern "C" double read_seconds(int threads) {
    auto start = std::chrono::steady_clock::now();
    in_threads(threads, read);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

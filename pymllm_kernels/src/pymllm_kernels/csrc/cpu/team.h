// The thread team: torch's own OpenMP pool, entered through the GNU entry points.
//
// libgomp (bundled with torch) as well as libomp and libiomp5 export GOMP_parallel and
// GOMP_barrier, so these two calls work with whichever runtime torch brought and with any
// compiler; `#pragma omp` would bind clang builds to a second runtime whose idle threads
// spin against torch's.
#pragma once

#include <atomic>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace pymllm {

struct Range {
    int64_t begin;
    int64_t end;
};

// The share of thread `rank` of `size` in `count` items: contiguous, differing by at most one.
inline Range share(int64_t count, int rank, int size) {
    return {count * rank / size, count * (rank + 1) / size};
}

// Runs body(rank, size) on `threads` threads of the calling thread's OpenMP pool. `size` is
// the number that really joined, which may be smaller than `threads`.
template <typename Body>
void parallel(int threads, Body& body) {
    if (threads <= 1) {
        body(0, 1);
        return;
    }
    GOMP_parallel(
        [](void* data) { (*static_cast<Body*>(data))(omp_get_thread_num(), omp_get_num_threads()); },
        &body, static_cast<unsigned>(threads), 0);
}

inline void barrier(int size) {
    if (size > 1) GOMP_barrier();
}

}  // namespace pymllm

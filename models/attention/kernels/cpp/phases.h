// Threads: work runs in phases. A phase ends when all its tasks have ended.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace {

// Every thread has a Space (its memory), constructed from the arguments that run_phases is given.
template <class Space>
struct Phase {
    int64_t tasks;
    std::function<void(int64_t, Space&)> run;
};

// GOMP_parallel of the OpenMP library that torch has loaded, or null. Threads of our own would compete with torch's,
// which do not sleep while they wait for torch's next operation.
typedef void (*Parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
Parallel torch_threads = nullptr;

// Runs work on up to `threads` threads, this one among them, and waits for them.
inline void in_parallel(int threads, const std::function<void()>& work) {
    if (threads > 1 && torch_threads) {
        torch_threads([](void* data) { (*(const std::function<void()>*)data)(); }, (void*)&work, threads, 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}

// Run the phases one after the other, the tasks of each on up to `threads` threads.
template <class Space, class... Arguments>
void run_phases(int threads, const std::vector<Phase<Space>>& phases, const Arguments&... arguments) {
    threads = std::max(threads, 1);
    std::vector<std::unique_ptr<Space>> spaces(threads);
    for (const Phase<Space>& phase : phases) {
        std::atomic<int64_t> next{0};
        std::atomic<int> arrived{0};
        in_parallel((int)std::min<int64_t>(threads, phase.tasks), [&] {
            std::unique_ptr<Space>& space = spaces[arrived++];
            if (!space) space.reset(new Space(arguments...));
            for (int64_t task; (task = next++) < phase.tasks;) phase.run(task, *space);
        });
    }
}

constexpr int PIECE = 1024;  // positions of one task, where every position is visited once

}  // namespace

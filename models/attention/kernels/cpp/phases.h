// Threads: work in phases, each done when all its tasks are.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace {

// Every thread works in a space of its own, made from the arguments that run_phases is given.
template <class Space>
struct Phase {
    int64_t tasks;
    std::function<void(int64_t, Space&)> run;
};

template <class Space, class... Arguments>
void run_phases(int threads, const std::vector<Phase<Space>>& phases, const Arguments&... arguments) {
    threads = std::max(threads, 1);
    std::vector<std::atomic<int64_t>> next(phases.size());
    for (auto& n : next) n = 0;
    std::atomic<int64_t> arrived{0};
    auto work = [&] {
        Space scratch(arguments...);
        for (size_t i = 0; i < phases.size(); ++i) {
            for (int64_t task; (task = next[i]++) < phases[i].tasks;) phases[i].run(task, scratch);
            ++arrived;
            for (int spins = 0; arrived < (int64_t)(i + 1) * threads; ++spins)
                if (spins > 1000) std::this_thread::yield();
        }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}

constexpr int SPREAD = 1024;  // positions of a task that only goes through them

}  // namespace

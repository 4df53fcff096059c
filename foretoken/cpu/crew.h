// How threads share work: torch's, piece by piece, or a crew's, for the whole run of a program.

#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

namespace {

// How near to bring what is fetched: into a core's second-level cache, or into its first.
constexpr int NEAR = 2, NEAREST = 3;

// Begin to bring `count` values nearer; it does no harm if there are none.
template <int LEVEL = NEAR, class T>
inline void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, 0, LEVEL);
}

// `count` blocks of weights of so many bytes, which one piece of work reads.
struct Weights {
  const char* first;
  int64_t count, bytes;
};

class Crew;

// What a thread has to do of a piece of work.
class Items {
 public:
  Items(int64_t begin, int64_t end) : begin(begin), end(end) {}
  Items(Crew& crew, int rank) : crew(&crew), rank(rank) {}
  int64_t next();  // one of them; -1: there is none left

 private:
  Crew* crew = nullptr;
  int rank = 0;
  int64_t begin = 0, end = 0;
};

// Threads that stay together while a program runs. Between two pieces of work they wait by looking, and so begin within
// a fraction of a microsecond; while they wait they fetch the weights that are read next. A thread that is done with its
// part takes from the others'.
class Crew {
 public:
  static thread_local Crew* led;  // by this thread

  // task() with torch's number of threads as its crew. `order`: the weights that the last run read, and then this one.
  template <class Task>
  static void run(std::vector<Weights>& order, const Task& task) {
    Crew crew(order);
#pragma omp parallel num_threads(std::min(MOST, at::get_num_threads()))
    {
      if (const int rank = omp_get_thread_num(); rank > 0) crew.serve(rank);
      else crew.lead(omp_get_num_threads(), task);
    }
    order = std::move(crew.read);
    crew.rethrow();
  }

  // work(Items) on every thread; together they do 0 .. count.
  template <class Work>
  void share(int64_t count, const Work& what) {
    work = [](const void* w, Items items) { (*static_cast<const Work*>(w))(items); };
    data = &what;
    next = read.size();
    for (int rank = 0; rank < size; rank++)
      parts[rank].store(of(rank * count / size, (rank + 1) * count / size), std::memory_order_relaxed);
    busy.store(size - 1, std::memory_order_relaxed);
    begun.fetch_add(1, std::memory_order_release);
    take_part(0);
    for (int looks = 0; busy.load(std::memory_order_acquire);) rest(looks);
    rethrow();
  }

  // Say which weights the next piece of work reads.
  void note(Weights weights) { read.push_back(weights); }

 private:
  friend class Items;
  using Part = std::uint64_t;               // first and last + 1 of the items that are left to a thread
  static constexpr int MOST = 256;           // threads
  static constexpr int64_t EARLY = 1 << 19;  // bytes that are fetched before they are needed: half a core's own cache
  struct alignas(64) Left : std::atomic<Part> {};

  const std::vector<Weights>& order;
  std::vector<Weights> read;  // so far
  size_t next = 0;            // how many have been read when the last piece of work is done
  int size = 1;
  void (*work)(const void*, Items) = nullptr;
  const void* data = nullptr;
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  alignas(64) std::atomic<std::uint32_t> begun{0};  // pieces of work
  alignas(64) std::atomic<int> busy{0};             // threads that are not done with the last one
  Left parts[MOST];

  explicit Crew(const std::vector<Weights>& order) : order(order) { read.reserve(order.size()); }

  static Part of(int64_t begin, int64_t end) { return Part(begin) << 32 | Part(end); }

  // Once more to look in vain: soon again at first, then as soon as nobody else wants the processor.
  static void rest(int& looks) {
    if (++looks > 1000) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // One item from the front of a thread's part, or from its back; -1 if there is none.
  int64_t take(int rank, bool front) {
    Part was = parts[rank].load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = was >> 32, end = was & 0xffffffffu;
      if (begin >= end) return -1;
      const Part left = front ? of(begin + 1, end) : of(begin, end - 1);
      if (parts[rank].compare_exchange_weak(was, left, std::memory_order_relaxed)) return front ? begin : end - 1;
    }
  }

  void take_part(int rank) {
    try {
      work(data, Items(*this, rank));
    } catch (...) {
      keep_error();
    }
  }

  template <class Task>
  void lead(int threads, const Task& task) {
    size = threads;
    led = threads > 1 ? this : nullptr;
    try {
      task();
    } catch (...) {
      keep_error();
    }
    led = nullptr;
    work = nullptr;
    begun.fetch_add(1, std::memory_order_release);
  }

  void serve(int rank) {
    size_t soon = 0;
    for (std::uint32_t seen = 0;; seen++) {
      wait(rank, seen, soon);
      if (!work) return;
      take_part(rank);
      soon = next;
      busy.fetch_sub(1, std::memory_order_release);
    }
  }

  // Until more than `seen` pieces of work have begun; fetches this thread's part of weights number `soon`.
  void wait(int rank, std::uint32_t seen, size_t soon) {
    const char *at = nullptr, *end = nullptr;
    if (!order.empty()) {
      const Weights& weights = order[soon % order.size()];
      const int64_t threads = omp_get_num_threads();
      at = weights.first + rank * weights.count / threads * weights.bytes;
      end = std::min(at + EARLY, weights.first + (rank + 1) * weights.count / threads * weights.bytes);
    }
    for (int looks = 0; begun.load(std::memory_order_acquire) == seen;) {
      if (at < end) fetch(at, 512), at += 512;
      else rest(looks);
    }
  }

  void keep_error() {
    if (!failed.exchange(true)) error = std::current_exception();
  }

  void rethrow() {
    if (failed.exchange(false)) std::rethrow_exception(std::exchange(error, nullptr));
  }
};

thread_local Crew* Crew::led = nullptr;

int64_t Items::next() {
  if (!crew) return begin < end ? begin++ : -1;
  for (int i = 0; i < crew->size; i++)
    if (const int64_t item = crew->take((rank + i) % crew->size, i == 0); item >= 0) return item;
  return -1;
}

// work(Items) on this thread's crew, or on torch's threads; together they do 0 .. count.
template <class Work>
void share(int64_t count, const Work& work) {
  if (Crew::led && count > 1) return Crew::led->share(count, work);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { work(Items(begin, end)); });
}

}  // namespace

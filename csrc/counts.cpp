// How many candidates of each language rank above each relevant candidate, over a chunk of score rows (CPU).
//
// A row holds a query's scores, its columns grouped by language. For each language's block and each relevant candidate
// of the query: count the scores that are higher, and those that are equal and lie before the candidate (`splits`: the
// first column of the block that loses ties against it). Blocks are the outer loop: one (5 kB for 1,200 sentences)
// stays in the L1 cache over all relevant candidates; the next one is fetched meanwhile, a share with each candidate.
//
// 15 comparisons a nanosecond on one core with AVX-512 and scores in memory, 19 with scores in L2; without the prefetch
// 12 in memory, as Numba's form of the same loops. Tried and lost: 4 candidates at once over one load of the scores
// (comparisons, not loads, are the limit), and GCC's 64-byte vectors (a tenth where they are lowered to AVX2).
//
// The two loops are plain C++, which GCC and Clang vectorise; target_clones compiles them for AVX-512, AVX2 and the
// base instruction set, and the loader picks. Rows are split among torch's threads. Counts are integers: the result
// depends on nothing but the scores.
//
// Built against torch's stable ABI, as tiles.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

using torch::stable::Tensor;

namespace {

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 12 || __clang_major__ >= 17)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

constexpr std::int64_t kLine = 16;          // scores in a cache line
constexpr std::int64_t kPrefetched = 4096;  // a longer block would push the present one out of the cache

struct Problem {
  const float* scores;            // (n, M), the rows of queries first .. first + n - 1
  std::int64_t stride, first;
  const std::int64_t* offsets;    // (N + 1)
  const std::int64_t* positions;  // (R) columns of the relevant candidates
  const std::int64_t* blocks;     // (L, 2) first column and end of each language
  const std::int32_t* splits;     // (R, L)
  std::int64_t languages;
  std::int32_t* higher;           // (R, L)
};

INLINE std::int32_t at_least(const float* __restrict scores, std::int64_t n, float threshold) {
  std::int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (std::int64_t j = 0; j < n; ++j) count += scores[j] >= threshold;
  return count;
}

INLINE std::int32_t above(const float* __restrict scores, std::int64_t n, float threshold) {
  std::int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (std::int64_t j = 0; j < n; ++j) count += scores[j] > threshold;
  return count;
}

}  // namespace

namespace hbt_fast {

FOR_EACH_CPU void count_rows(const Problem& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float* const row = p.scores + i * p.stride;
    const std::int64_t first = p.offsets[p.first + i], last = p.offsets[p.first + i + 1];
    for (std::int64_t l = 0; l < p.languages; ++l) {
      const std::int64_t a = p.blocks[2 * l], b = p.blocks[2 * l + 1];
      const std::int64_t next = l + 1 < p.languages ? l + 1 : 0;
      const float* ahead = row + (next ? 0 : p.stride) + p.blocks[2 * next];
      const std::int64_t size = p.blocks[2 * next + 1] - p.blocks[2 * next];
      const std::int64_t share = first < last && size <= kPrefetched ? (size + last - first - 1) / (last - first) : 0;
      for (std::int64_t r = first; r < last; ++r) {
        for (std::int64_t j = 0; j < share; j += kLine) __builtin_prefetch(ahead + j);
        ahead += share;
        // Out of the very row that is compared: a separately computed dot product may differ in the last bit.
        const float t = row[p.positions[r]];
        const std::int64_t split = p.splits[r * p.languages + l];
        p.higher[r * p.languages + l] = at_least(row + a, split - a, t) + above(row + split, b - split, t);
      }
    }
  }
}

}  // namespace hbt_fast

namespace {

void count_higher(Tensor scores, std::int64_t first, Tensor offsets, Tensor positions, Tensor blocks, Tensor splits,
                  Tensor higher) {
  const auto longs = [](const Tensor& x) { return static_cast<const std::int64_t*>(x.const_data_ptr()); };
  const Problem problem{static_cast<const float*>(scores.const_data_ptr()),
                        scores.stride(0),
                        first,
                        longs(offsets),
                        longs(positions),
                        longs(blocks),
                        static_cast<const std::int32_t*>(splits.const_data_ptr()),
                        blocks.size(0),
                        static_cast<std::int32_t*>(higher.mutable_data_ptr())};
  torch::stable::parallel_for(0, scores.size(0), 1, [&](std::int64_t begin, std::int64_t end) {
    hbt_fast::count_rows(problem, begin, end);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(hbt_fast, library) {
  library.def("count_higher(Tensor scores, int first, Tensor offsets, Tensor positions, Tensor blocks, Tensor splits, "
              "Tensor(a!) higher) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hbt_fast, CPU, library) { library.impl("count_higher", TORCH_BOX(&count_higher)); }

}  // namespace

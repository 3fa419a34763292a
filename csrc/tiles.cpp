// InfoNCE's elementwise work on a CPU: what lies between the matrix products, done on one tile of logits at a time.
//
// A tile is R rows (queries) by C columns (passages) of S = scale * Q P^T, a few MiB, just written by the BLAS and still
// in cache. `statistics` reads it for the maxima and sums of exp over each row's and each column's negatives;
// `gradient` overwrites it with d loss / d S. The tile is read once for the maxima and once for the exponentials of the
// one, once for the other; masks, sums and factors are in the same loops.
//
// The loops are plain C++ over __restrict pointers, which GCC and Clang vectorise; target_clones compiles them for
// AVX-512, AVX2 and the base instruction set, and the loader picks. Threads are torch's (at::parallel_for) and split
// rows, so the result depends on the number of threads and on nothing else.
//
// Built against torch's stable ABI: one build serves every torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

using torch::stable::Tensor;

namespace {

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 12 || __clang_major__ >= 17)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

template <typename T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

// exp(x) for x <= 0: 2^n * 2^f with |f| <= 1/2 and a polynomial in f ln 2 (Cephes). Off by 8.4e-8 at most, relatively
// (measured over [-87, 0]; torch's: 6.2e-8). Below -87, 1e-38.
INLINE float exp_of(float x) {
  x = x > -87.0f ? x : -87.0f;
  const float n = std::nearbyint(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: n ln 2 is exact to 1e-9
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float two_to_n;
  std::memcpy(&two_to_n, &bits, 4);
  return y * two_to_n;
}

// Slow, and used where exactness is checked.
INLINE double exp_of(double x) { return std::exp(x); }

// The offset for exp: 0 where there is no maximum. (Not "finite": C's function of that name would win for double.)
template <typename T>
INLINE T or_zero(T maximum) {
  return maximum == kNone<T> ? T(0) : maximum;
}

// Who is no negative. A row and a column with one key have one content; a column of key -1 is nobody's negative in row
// terms (it repeats another column). `pair_*` and `owner_*`: a second relation of column terms, and of row terms. The
// margin compares cosines. A row's logits are s * gain, where a hardness of negatives is asked for.
template <typename T>
struct Masks {
  const std::int32_t* row_key;   // (R)
  const std::int32_t* col_key;   // (C)
  const std::int32_t* row_term;  // (R) keys of column terms
  const std::int32_t* col_term;  // (A)
  const std::int32_t* row_pair;  // (R) or null
  const std::int32_t* col_pair;  // (A)
  const T* row_inverse;      // (R) 1 / |q|, or null: no margin
  const T* col_inverse;      // (C) 1 / |p|
  const T* row_limit;        // (R)
  const T* col_limit;        // (A)
  const std::int32_t* row_owner;  // (R) or null
  const std::int32_t* col_owner;  // (C)
  T gain;                         // 1: no hardness
};

template <bool margin, bool owner, typename T>
INLINE bool row_drops(const Masks<T>& m, std::int64_t i, std::int64_t j, T s) {
  bool drop = (m.row_key[i] == m.col_key[j]) | (m.col_key[j] == -1);
  if (owner) drop |= m.row_owner[i] == m.col_owner[j];
  if (margin) drop |= s * m.row_inverse[i] * m.col_inverse[j] > m.row_limit[i];
  return drop;
}

template <bool margin, bool pair, typename T>
INLINE bool column_drops(const Masks<T>& m, std::int64_t i, std::int64_t j, T s) {
  bool drop = m.row_term[i] == m.col_term[j];
  if (pair) drop |= m.row_pair[i] == m.col_pair[j];
  if (margin) drop |= s * m.row_inverse[i] * m.col_inverse[j] > m.col_limit[j];
  return drop;
}

// Maxima of rows [begin, end) over their negatives, and of the first `a` columns over theirs (merged into col_max).
template <bool margin, bool pair, bool owner, typename T>
INLINE void maxima(const T* s, std::int64_t stride, std::int64_t begin, std::int64_t end, std::int64_t c,
                   std::int64_t a, const Masks<T> m, T* row_max, T* __restrict col_max) {
  for (std::int64_t i = begin; i < end; ++i) {
    const T* __restrict x = s + i * stride;
    T top = kNone<T>;
#pragma omp simd reduction(max : top)
    for (std::int64_t j = 0; j < a; ++j) {
      const T v = row_drops<margin, owner>(m, i, j, x[j]) ? kNone<T> : m.gain * x[j];
      const T w = column_drops<margin, pair>(m, i, j, x[j]) ? kNone<T> : x[j];
      top = v > top ? v : top;
      col_max[j] = w > col_max[j] ? w : col_max[j];
    }
#pragma omp simd reduction(max : top)
    for (std::int64_t j = a; j < c; ++j) {
      const T v = row_drops<margin, owner>(m, i, j, x[j]) ? kNone<T> : m.gain * x[j];
      top = v > top ? v : top;
    }
    row_max[i] = top;
  }
}

template <bool margin, bool pair, bool owner, typename T>
INLINE void sums(const T* s, std::int64_t stride, std::int64_t begin, std::int64_t end, std::int64_t c,
                 std::int64_t a, const Masks<T> m, const T* row_max, T* row_sum, const T* __restrict col_max,
                 T* __restrict col_sum) {
  for (std::int64_t i = begin; i < end; ++i) {
    const T* __restrict x = s + i * stride;
    const T top = or_zero(row_max[i]);
    T sum = T(0);
#pragma omp simd reduction(+ : sum)
    for (std::int64_t j = 0; j < a; ++j) {
      const T e = exp_of(m.gain * x[j] - top), f = exp_of(x[j] - col_max[j]);
      sum += row_drops<margin, owner>(m, i, j, x[j]) ? T(0) : e;
      col_sum[j] += column_drops<margin, pair>(m, i, j, x[j]) ? T(0) : f;
    }
#pragma omp simd reduction(+ : sum)
    for (std::int64_t j = a; j < c; ++j) {
      const T e = exp_of(m.gain * x[j] - top);
      sum += row_drops<margin, owner>(m, i, j, x[j]) ? T(0) : e;
    }
    row_sum[i] = sum;
  }
}

template <bool margin, bool pair, bool owner, typename T>
INLINE void gradients(T* s, std::int64_t stride, std::int64_t begin, std::int64_t end, std::int64_t c,
                      std::int64_t a, const Masks<T> m, const T* row_max, const T* row_factor,
                      const T* __restrict col_max, const T* __restrict col_factor) {
  for (std::int64_t i = begin; i < end; ++i) {
    T* __restrict x = s + i * stride;
    const T top = or_zero(row_max[i]), factor = row_factor[i];
#pragma omp simd
    for (std::int64_t j = 0; j < a; ++j) {
      const T e = factor * exp_of(m.gain * x[j] - top), f = col_factor[j] * exp_of(x[j] - col_max[j]);
      x[j] = (row_drops<margin, owner>(m, i, j, x[j]) ? T(0) : e) + (column_drops<margin, pair>(m, i, j, x[j]) ? T(0) : f);
    }
#pragma omp simd
    for (std::int64_t j = a; j < c; ++j) {
      const T e = factor * exp_of(m.gain * x[j] - top);
      x[j] = row_drops<margin, owner>(m, i, j, x[j]) ? T(0) : e;
    }
  }
}

// The loops, compiled once per instruction set. Options are resolved outside them, by a macro because a lambda would not be
// compiled along.
#define WITH_OWNER(function, margin, pair, ...)                     \
  if (m.row_owner) function<margin, pair, true>(__VA_ARGS__);       \
  else function<margin, pair, false>(__VA_ARGS__)
#define WITH_OPTIONS(function, ...)                                                        \
  if (m.row_inverse && m.row_pair) { WITH_OWNER(function, true, true, __VA_ARGS__); }      \
  else if (m.row_inverse) { WITH_OWNER(function, true, false, __VA_ARGS__); }              \
  else if (m.row_pair) { WITH_OWNER(function, false, true, __VA_ARGS__); }                 \
  else { WITH_OWNER(function, false, false, __VA_ARGS__); }

template <typename T>
struct Tile {
  T* s;
  std::int64_t stride, rows, c, a;  // the first `a` of `c` columns have column terms
};

}  // namespace

namespace hbt_fast {

// Rows [begin, end): their (max, sum), and theirs alone of the columns. In fp32 and, by the macro, in fp64.
#define DEFINE(T)                                                                                                     \
  FOR_EACH_CPU void statistics_of(const Tile<T>& t, const Masks<T>& m, std::int64_t begin, std::int64_t end,          \
                                  T* row_max, T* row_sum, T* col_max, T* col_sum) {                                   \
    WITH_OPTIONS(maxima, t.s, t.stride, begin, end, t.c, t.a, m, row_max, col_max);                                   \
    for (std::int64_t j = 0; j < t.a; ++j) {                                                                          \
      col_max[j] = or_zero(col_max[j]);                                                                                \
      col_sum[j] = 0;                                                                                                 \
    }                                                                                                                 \
    WITH_OPTIONS(sums, t.s, t.stride, begin, end, t.c, t.a, m, row_max, row_sum, col_max, col_sum);                   \
  }                                                                                                                   \
  FOR_EACH_CPU void gradient_of(const Tile<T>& t, const Masks<T>& m, std::int64_t begin, std::int64_t end,            \
                                const T* row_max, const T* row_factor, const T* col_max, const T* col_factor) {       \
    WITH_OPTIONS(gradients, t.s, t.stride, begin, end, t.c, t.a, m, row_max, row_factor, col_max, col_factor);        \
  }
DEFINE(float)
DEFINE(double)

}  // namespace hbt_fast

namespace {

// A running (max, sum) takes in another; sum 0 says that there was no negative.
template <typename T>
void merge(T& maximum, T& sum, T other_maximum, T other_sum) {
  if (other_sum == 0) return;
  if (sum == 0 || other_maximum > maximum) {
    sum = sum == 0 ? other_sum : sum * std::exp(maximum - other_maximum) + other_sum;
    maximum = other_maximum;
  } else {
    sum += other_sum * std::exp(other_maximum - maximum);
  }
}

using Maybe = std::optional<Tensor>;

template <typename T>
const T* values(const Maybe& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <typename T>
T* changed(const Maybe& x) {
  return x ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

template <typename T>
Tile<T> tile_of(const Tensor& s, const Maybe& col_term) {
  return {static_cast<T*>(s.mutable_data_ptr()), s.stride(0), s.size(0), s.size(1), col_term ? col_term->size(0) : 0};
}

#define MASK_ARGUMENTS                                                                                    \
  Tensor row_key, Tensor col_key, Maybe row_term, Maybe col_term, Maybe row_pair, Maybe col_pair,         \
      Maybe row_inverse, Maybe col_inverse, Maybe row_limit, Maybe col_limit, Maybe row_owner,            \
      Maybe col_owner, Maybe row_gain
#define MASK_NAMES                                                                                        \
  row_key, col_key, row_term, col_term, row_pair, col_pair, row_inverse, col_inverse, row_limit, col_limit, \
      row_owner, col_owner, row_gain
#define MASK_SCHEMA                                                                                              \
  "Tensor row_key, Tensor col_key, Tensor? row_term, Tensor? col_term, Tensor? row_pair, Tensor? col_pair, "     \
  "Tensor? row_inverse, Tensor? col_inverse, Tensor? row_limit, Tensor? col_limit, Tensor? row_owner, "          \
  "Tensor? col_owner, Tensor? row_gain"

template <typename T>
Masks<T> masks_of(MASK_ARGUMENTS) {
  using Key = std::int32_t;
  return {values<Key>(row_key),  values<Key>(col_key),   values<Key>(row_term),  values<Key>(col_term),
          values<Key>(row_pair), values<Key>(col_pair),  values<T>(row_inverse), values<T>(col_inverse),
          values<T>(row_limit),  values<T>(col_limit),   values<Key>(row_owner), values<Key>(col_owner),
          row_gain ? *values<T>(row_gain) : T(1)};
}

template <typename T>
void statistics_in(const Tile<T> t, const Masks<T> m, T* row_max, T* row_sum, T* col_max, T* col_sum) {
  const std::int64_t threads = std::min<std::int64_t>(torch::stable::get_num_threads(), t.rows);
  std::vector<T> rows(2 * t.rows), columns(2 * threads * t.a, kNone<T>);
  torch::stable::parallel_for(0, threads, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t k = first; k < last; ++k) {
      const std::int64_t begin = k * t.rows / threads, end = (k + 1) * t.rows / threads;
      T* const mine = columns.data() + 2 * k * t.a;
      hbt_fast::statistics_of(t, m, begin, end, rows.data(), rows.data() + t.rows, mine, mine + t.a);
      for (std::int64_t i = begin; i < end; ++i) merge(row_max[i], row_sum[i], rows[i], rows[t.rows + i]);
    }
  });
  for (std::int64_t k = 0; k < threads; ++k) {
    const T* const mine = columns.data() + 2 * k * t.a;
    for (std::int64_t j = 0; j < t.a; ++j) merge(col_max[j], col_sum[j], mine[j], mine[t.a + j]);
  }
}

template <typename T>
void gradient_in(const Tile<T> t, const Masks<T> m, const T* row_max, const T* row_factor, const T* col_max,
                 const T* col_factor) {
  torch::stable::parallel_for(0, t.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    hbt_fast::gradient_of(t, m, begin, end, row_max, row_factor, col_max, col_factor);
  });
}

void statistics(Tensor s, Tensor row_max, Tensor row_sum, Maybe col_max, Maybe col_sum, MASK_ARGUMENTS) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    statistics_in(tile_of<T>(s, col_term), masks_of<T>(MASK_NAMES), changed<T>(row_max), changed<T>(row_sum),
                  changed<T>(col_max), changed<T>(col_sum));
  };
  s.element_size() == 4 ? run(0.0f) : run(0.0);
}

void gradient(Tensor s, Tensor row_max, Tensor row_factor, Maybe col_max, Maybe col_factor, MASK_ARGUMENTS) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    gradient_in(tile_of<T>(s, col_term), masks_of<T>(MASK_NAMES), values<T>(row_max), values<T>(row_factor),
                values<T>(col_max), values<T>(col_factor));
  };
  s.element_size() == 4 ? run(0.0f) : run(0.0);
}

STABLE_TORCH_LIBRARY(hbt_fast, library) {
  library.def("tile_statistics(Tensor s, Tensor(a!) row_max, Tensor(b!) row_sum, Tensor(c!)? col_max, "
              "Tensor(d!)? col_sum, " MASK_SCHEMA ") -> ()");
  library.def("tile_gradient(Tensor(a!) s, Tensor row_max, Tensor row_factor, Tensor? col_max, Tensor? col_factor, "
              MASK_SCHEMA ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(hbt_fast, CPU, library) {
  library.impl("tile_statistics", TORCH_BOX(&statistics));
  library.impl("tile_gradient", TORCH_BOX(&gradient));
}

}  // namespace

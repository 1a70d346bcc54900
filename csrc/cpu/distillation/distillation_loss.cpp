// The losses of DINO (arXiv:2104.14294) and iBOT (arXiv:2111.07832) on the CPU.
//
//     P = softmax((t - c) / tt),    Q = softmax(s / ts),    H(P, Q) = log sum_k exp((s_k - M) / ts) + <P, M - s> / ts
//     dH/ds = (Q - P) / ts
//
// with M the largest s_k, so that no terms cancel.
//
// Algorithm. One thread processes one row of the batch. The exponentials of all of the teacher's views stay in the
// second-level cache, and so does, for each view of the student, their sum over the other views. Then the student's row
// is read from memory, once. Its exponentials stay in the cache too, so that the gradient, if it is asked for, takes
// one more pass over them. The gradient is written into large pages, bypassing the cache if it is too large to stay
// there.
//
// Cost. Memory traffic: student and teacher are read and the gradient is written, once each. Without `derive` the
// backward pass reads both again.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/exponents.h"
#include "common/pages.h"
#include "common/portable.h"
#include "common/tensors.h"
#include "common/token_rows.h"
#include "distillation/distillation_tiles.h"

namespace fastssl {
namespace {

constexpr int64_t kGrain = 1 << 15;          // fewer logits are not worth another thread
constexpr int64_t kStreamedBytes = 1 << 25;  // a larger gradient leaves every cache before it is read

// The rows of one view.
struct View {
  char* data;
  Element element;
  int64_t stride;  // in bytes

  void* row(int64_t i) const { return data + i * stride; }
};

void add_views(const Tensor& piece, std::vector<View>& views) {
  const int64_t bytes = piece.element_size();
  for (int64_t v = 0; v < piece.size(0); ++v)
    views.push_back({static_cast<char*>(const_cast<void*>(piece.const_data_ptr())) + v * piece.stride(0) * bytes,
                     element_of(piece), piece.stride(1) * bytes});
}

// The views of all pieces (V, N, K), each of N rows.
std::vector<View> views_of(const char* name, at::TensorList pieces, const Tensor& like, std::vector<Tensor>& held) {
  TORCH_CHECK_VALUE(!pieces.empty(), name, " must have at least one tensor");
  std::vector<View> views;
  for (const Tensor& piece : pieces) {
    TORCH_CHECK_VALUE(piece.dim() == 3 && piece.size(1) == like.size(1) && piece.size(2) == like.size(2) &&
                          piece.size(2) > 0,
                      name, " must have shapes (V, ", like.size(1), ", ", like.size(2), "), got ", piece.sizes());
    TORCH_CHECK_VALUE(has_element(piece), name, " must be float32, bfloat16 or float16, got ", piece.scalar_type());
    TORCH_CHECK_VALUE(piece.device() == like.device(), name, " must be on the CPU, as student is");
    held.push_back(with_unit_stride(piece));
    add_views(held.back(), views);
  }
  return views;
}

// The data of a vector, checked to be float32 of that length.
const float* data_of(const char* name, const Tensor& vector, int64_t length, std::vector<Tensor>& held) {
  TORCH_CHECK_VALUE(vector.scalar_type() == at::kFloat && vector.dim() == 1 && vector.size(0) == length, name,
                    " must be float32 of shape (", length, "), got ", vector.scalar_type(), " of shape ",
                    vector.sizes());
  held.push_back(vector.contiguous());
  return held.back().const_data_ptr<float>();
}

struct Distillation {
  std::vector<Tensor> held;
  std::vector<View> student, teacher, gradient;
  int64_t rows, columns;
  const float* center;
  double student_temperature, teacher_temperature;
  bool unlike_views;

  Distillation(at::TensorList student_, at::TensorList teacher_, const std::optional<Tensor>& center_,
               double student_temperature, double teacher_temperature, bool unlike_views)
      : student_temperature(student_temperature > 0 ? student_temperature : NAN),
        teacher_temperature(teacher_temperature > 0 ? teacher_temperature : NAN),
        unlike_views(unlike_views) {
    TORCH_CHECK_VALUE(!student_.empty() && student_[0].dim() == 3, "student must have shapes (V, N, K)");
    rows = student_[0].size(1), columns = student_[0].size(2);
    student = views_of("student", student_, student_[0], held);
    teacher = views_of("teacher", teacher_, student_[0], held);
    TORCH_CHECK_VALUE(unlike_views || student.size() == teacher.size(),
                      "student and teacher must have as many views, got ", student.size(), " and ", teacher.size());
    center = center_ ? data_of("center", *center_, columns, held) : nullptr;
  }

  std::vector<Tensor> new_gradients(at::TensorList pieces) {
    std::vector<Tensor> tensors;
    for (const Tensor& piece : pieces) {
      tensors.push_back(empty_in_large_pages(piece.sizes(), piece.options()));
      add_views(tensors.back(), gradient);
    }
    return tensors;
  }

  // Computes each row's loss, unless null; and its gradient times factor[i], if gradients are wanted.
  void run(float* loss, const float* factor) const {
    const DistillationTiles& tile = FASTSSL_TABLE_IN_USE(distillation_tiles);
    const int64_t padded = padded_row(columns), teachers = unlike_views ? teacher.size() : 1;
    const int64_t views = student.size() + teacher.size(), grain = std::max<int64_t>(1, kGrain / (views * columns));
    const bool stream = std::accumulate(gradient.begin(), gradient.end(), int64_t(0), [&](int64_t sum, const View& v) {
      return sum + rows * columns * bytes_of(v.element);
    }) > kStreamedBytes;
    at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
      // The distributions of the teacher's views, the sum of some of them, and that of the student.
      const Blocks memory(teachers + 2, (padded + factors_of_row(columns)) * sizeof(float));
      const auto place = [&](int64_t n) { return Distribution{memory.floats(n), memory.floats(n) + padded}; };
      const Distribution some = place(teachers), learned = place(teachers + 1);
      std::vector<Distribution> targets, others;
      for (int64_t t = 0; t < teachers; ++t) targets.push_back(place(t));
      for (int64_t i = first; i < last; ++i) {
        double sum = 0;
        const auto teach = [&](const View& view, const Distribution& out) {
          tile.teacher(view.row(i), view.element, center, columns, exponent_scale_at(teacher_temperature), out);
        };
        const auto learn = [&](size_t view, const Distribution& target, int64_t count) {
          sum += learn_row(tile, view, i, target, count, factor ? factor[i] : 0, stream, learned);
        };
        if (!unlike_views) {
          for (size_t v = 0; v < student.size(); ++v) {
            teach(teacher[v], targets[0]);
            learn(v, targets[0], 1);
          }
        } else {
          for (int64_t t = 0; t < teachers; ++t) teach(teacher[t], targets[t]);
          const size_t both = std::min(student.size(), teacher.size());
          for (size_t v = 0; v < both; ++v) {
            others = targets;
            others.erase(others.begin() + v);
            learn(v, sum_of(tile, others, some), teachers - 1);
          }
          if (student.size() > both) {
            const Distribution all = sum_of(tile, targets, targets[0]);  // in place: nothing reads them again
            for (size_t v = both; v < student.size(); ++v) learn(v, all, teachers);
          }
        }
        if (loss) loss[i] = static_cast<float>(sum);
      }
      if (stream) tile.finish_streams();
    });
  }

 private:
  // The sum, which is in `out` if there are several.
  Distribution sum_of(const DistillationTiles& tile, const std::vector<Distribution>& targets,
                      const Distribution& out) const {
    if (targets.size() > 1) tile.add(targets.data(), targets.size(), columns, out);
    return targets.size() == 1 ? targets[0] : out;
  }

  // The loss of a row taught by `count` distributions, whose sum is `target`.
  double learn_row(const DistillationTiles& tile, size_t view, int64_t i, const Distribution& target, int64_t count,
                   float factor, bool stream, const Distribution& learned) const {
    const bool derive = !gradient.empty();
    if (count == 0) {
      if (derive) std::memset(gradient[view].row(i), 0, columns * bytes_of(gradient[view].element));
      return 0;
    }
    const View& x = student[view];
    const RowSums sums = tile.student(x.row(i), x.element, target, columns, exponent_scale_at(student_temperature),
                                      derive ? learned : Distribution{});
    if (derive) {
      const double scale = factor / student_temperature;
      tile.gradient(learned, static_cast<float>(scale * count), target, static_cast<float>(scale), columns,
                    gradient[view].element, stream, gradient[view].row(i));
    }
    return count * std::log(static_cast<double>(sums.total)) + 2.0 * sums.distance / student_temperature;
  }
};

std::tuple<Tensor, std::vector<Tensor>> distillation_loss(at::TensorList student, at::TensorList teacher,
                                                          const std::optional<Tensor>& center,
                                                          const std::optional<Tensor>& weight,
                                                          double student_temperature, double teacher_temperature,
                                                          bool unlike_views, bool derive) {
  TORCH_CHECK_VALUE(weight || !derive, "weight must be given where gradients are taken");
  Distillation task(student, teacher, center, student_temperature, teacher_temperature, unlike_views);
  const float* const weights = weight ? data_of("weight", *weight, task.rows, task.held) : nullptr;
  std::vector<Tensor> gradients;
  if (derive) gradients = task.new_gradients(student);
  const Tensor loss = at::empty({task.rows}, at::kFloat);
  float* const losses = loss.mutable_data_ptr<float>();
  task.run(losses, weights);
  if (!weight) return {loss, gradients};
  double total = 0;
  for (int64_t i = 0; i < task.rows; ++i) total += static_cast<double>(weights[i]) * losses[i];
  return {scalar(total), gradients};
}

std::vector<Tensor> distillation_loss_backward(const Tensor& grad_loss, at::TensorList student, at::TensorList teacher,
                                               const std::optional<Tensor>& center, const std::optional<Tensor>& weight,
                                               double student_temperature, double teacher_temperature,
                                               bool unlike_views) {
  Distillation task(student, teacher, center, student_temperature, teacher_temperature, unlike_views);
  std::vector<Tensor> gradients = task.new_gradients(student);
  const Tensor factor = weight ? *weight * grad_loss : grad_loss;
  task.run(nullptr, data_of("weight and grad_loss", factor, task.rows, task.held));
  return gradients;
}

FASTSSL_KERNELS(CPU, m) {
  implement<&distillation_loss>(m, "distillation_loss");
  implement<&distillation_loss_backward, 2>(m, "distillation_loss_backward");
}

}  // namespace
}  // namespace fastssl

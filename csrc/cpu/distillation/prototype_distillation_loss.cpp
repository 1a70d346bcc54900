// The losses of DINO and iBOT from features and prototypes on the CPU.
//
//     S = X W^T,   T = Y V^T - c,   P = softmax(T / tt),   Q = softmax(S / ts),
//     H(P, Q) = log sum_k exp((S_k - M) / ts) + <P, M - S> / ts,     G = dH/dS = (Q - P) / ts
//     dX = G W,    dW = G^T X
//
// with M the largest S_k: no terms that cancel. X and Y are the views of student and teacher, which share W and V.
//
// Algorithm. A block of rows of all views at a time, as common/logits.h says. In a tile of classes and rows the
// teacher's exponentials come first; with the student's of each view <P, M - S> is taken for each teacher, whose
// normaliser is not known yet, so that each has a sum of its own. Exponentials are kept, and become weights in place.
// With U = 2 M K D operations, M the rows of all views of one side, that is 4 U for as many views of the teacher as of
// the student, and O(block K) memory, where eager PyTorch takes 4 U and keeps several M x K matrices. Without gradients
// it is 2 U.
#include <torch/library.h>

#include <cmath>
#include <deque>
#include <optional>
#include <tuple>
#include <vector>

#include "common/arena.h"
#include "common/checks.h"
#include "common/exponents.h"
#include "common/logits.h"
#include "common/portable.h"
#include "common/token_rows.h"

namespace fastssl {
namespace {

void check_features(const char* names, const Tensor& features, const Tensor& prototypes) {
  TORCH_CHECK_VALUE(features.dim() == 3 && prototypes.dim() == 2 && features.size(2) == prototypes.size(1) &&
                        features.size(2) > 0,
                    names, " must have shapes (V, N, D) and (K, D), D > 0, got ", features.sizes(), " and ",
                    prototypes.sizes());
  TORCH_CHECK_VALUE(has_element(features) && has_element(prototypes), names,
                    " must be float32, bfloat16 or float16, got ", features.scalar_type(), " and ",
                    prototypes.scalar_type());
}

void check(const Tensor& student, const Tensor& student_prototypes, const Tensor& teacher,
           const Tensor& teacher_prototypes, bool unlike_views) {
  check_features("student and student_prototypes", student, student_prototypes);
  check_features("teacher and teacher_prototypes", teacher, teacher_prototypes);
  TORCH_CHECK_VALUE(student.size(1) == teacher.size(1) && student.size(0) > 0, "student and teacher must have as many"
                    " rows, got ", student.sizes(), " and ", teacher.sizes());
  TORCH_CHECK_VALUE(student_prototypes.size(0) == teacher_prototypes.size(0) && student_prototypes.size(0) > 0,
                    "student_prototypes and teacher_prototypes must have as many rows, got ",
                    student_prototypes.sizes(), " and ", teacher_prototypes.sizes());
  TORCH_CHECK_VALUE(teacher.size(0) > 0 && (unlike_views || student.size(0) == teacher.size(0)),
                    "student and teacher must have as many views, got ", student.sizes(), " and ", teacher.sizes());
}

// A pair of views, of the teacher and the student, that are compared.
struct Pair {
  int64_t teacher;
  Numbers<float> distance;  // of each tile and row, then of each row
};

struct PrototypeDistillation {
  const Engine engine;
  const int64_t rows, classes, views, teachers;
  const int threads;
  const bool unlike_views;
  const double student_temperature;
  const float student_c, teacher_c;
  Tensor center;
  const Cut cut, class_cut;
  const Side w, v;
  std::deque<Side> x, y;
  const LogitsTiles& f = FASTSSL_TABLE_IN_USE(logits_tiles);

  PrototypeDistillation(const Tensor& student, const Tensor& student_prototypes, const Tensor& teacher,
                        const Tensor& teacher_prototypes, const std::optional<Tensor>& center_,
                        double student_temperature, double teacher_temperature, bool unlike_views, bool derive,
                        c10::string_view precision)
      : engine(precision),
        rows(student.size(1)),
        classes(student_prototypes.size(0)),
        views(student.size(0)),
        teachers(teacher.size(0)),
        threads(threads_for(rows * views, classes, student.size(2))),
        unlike_views(unlike_views),
        student_temperature(student_temperature),
        student_c(exponent_scale_at(student_temperature)),
        teacher_c(exponent_scale_at(teacher_temperature)),
        cut(cut_rows(rows, std::max(student.size(2), teacher.size(2)), classes, derive ? views + teachers : 0,
                     engine.bytes())),
        class_cut(classes, std::max(student.size(2), teacher.size(2)), threads),
        w(student_prototypes, false, kRows | (derive ? LayerGradients::roles(engine) : 0), engine, threads, class_cut),
        v(teacher_prototypes, false, kRows, engine, threads, class_cut) {
    if (center_) {
      check_vectors("center", classes, {*center_});
      center = center_->contiguous();
    }
    for (int64_t s = 0; s < views; ++s)
      x.emplace_back(student.select(0, s), false, kColumns | (derive ? kWeighed : 0), engine, threads, cut);
    for (int64_t t = 0; t < teachers; ++t) y.emplace_back(teacher.select(0, t), false, kColumns, engine, threads, cut);
  }

  // Each row's loss, unless null; and with `derive` the gradients of sum_i factor[i] loss[i], times `scale`.
  void run(float* loss, bool derive, const float* factor, float scale, const Tensor& dx, const Tensor& dw) const {
    const int64_t tile = class_cut.block * cut.block, kept_tiles = derive ? views + teachers : 0;
    const bool half = engine.half();
    std::vector<std::vector<Pair>> pairs(views);
    std::vector<LogitSums> sums;  // of the student's views, then of the teacher's
    for (int64_t i = 0; i < views + teachers; ++i) sums.emplace_back(class_cut.blocks, cut.block);
    int64_t most = 0;
    for (int64_t s = 0; s < views; ++s) {
      for (int64_t t = 0; t < teachers; ++t)
        if ((s == t) != unlike_views) pairs[s].push_back({t, Numbers<float>((class_cut.blocks + 1) * cut.block)});
      most = std::max<int64_t>(most, pairs[s].size());
    }
    const LargeBlocks kept(class_cut.blocks * kept_tiles, tile * engine.bytes());
    const Blocks tiles(threads, (teachers + 1) * tile * 4), distances(threads, most * cut.block * 4);
    const Blocks narrow(threads, derive && half ? 2 * tile * 2 : 0);
    const Blocks coefficients(views + teachers, cut.block * 4);
    const Blocks scaled(threads, (1 + most) * cut.block * 4);
    std::optional<LayerGradients> gradients;
    if (derive) gradients.emplace(w, views, cut.block, dw);
    const Layer student{w}, teacher{v};

    for (int64_t J = 0; J < cut.blocks; ++J) {
      const int64_t padded = x[0].padded(J), first = J * cut.block;
      fastssl::run(threads, class_cut.blocks, [&](int64_t I) {
        float* const scratch = tiles.floats(slot(threads));
        const LogitShape shape = student.shape(x[0], I, J);
        const auto take = [&](int64_t view, float* logits, const float* shift, float c, float* out,
                              const std::vector<const float*>& targets, float* distance) {
          void* const to = derive ? kept[I * kept_tiles + view] : nullptr;
          f.exponentials(logits, shape, shift, c, half || !to ? out : static_cast<float*>(to), half ? to : nullptr,
                         sums[view].largest + I * cut.block, sums[view].total + I * cut.block, targets.data(),
                         targets.size(), distance);
        };
        std::vector<const float*> exponentials(teachers), targets;
        for (int64_t t = 0; t < teachers; ++t) {
          float* const logits = scratch + t * tile;
          teacher.compute(y[t], I, J, logits);
          take(views + t, logits, center.defined() ? center.const_data_ptr<float>() + w.first(I) : nullptr, teacher_c,
               logits, {}, nullptr);
          exponentials[t] = derive && !half ? static_cast<float*>(kept[I * kept_tiles + views + t]) : logits;
        }
        for (int64_t s = 0; s < views; ++s) {
          float* const logits = scratch + teachers * tile;
          float* const distance = distances.floats(slot(threads));
          student.compute(x[s], I, J, logits);
          targets.clear();
          for (const Pair& pair : pairs[s]) targets.push_back(exponentials[pair.teacher]);
          take(s, logits, nullptr, student_c, nullptr, targets, distance);
          for (size_t p = 0; p < pairs[s].size(); ++p)
            std::copy_n(distance + p * padded, padded, pairs[s][p].distance.data + I * cut.block);
        }
      }, [&] { engine.release(); });

      for (int64_t i = 0; i < views + teachers; ++i) sums[i].combine(f, i < views ? student_c : teacher_c);
      for (int64_t s = 0; s < views; ++s)
        for (const Pair& pair : pairs[s]) {
          const LogitSums &of = sums[s], &by = sums[views + pair.teacher];
          f.combine_distance(pair.distance.data, of.largest, of.top, by.largest, by.total, by.top, class_cut.blocks,
                             cut.block, padded, teacher_c, pair.distance.data + class_cut.blocks * cut.block);
        }
      if (loss)
        for (int64_t r = 0; r < x[0].size(J); ++r) loss[first + r] = loss_of(pairs, sums, r);
      if (!derive) continue;

      for (int64_t i = 0; i < views + teachers; ++i)
        for (int64_t r = 0; r < x[0].size(J); ++r) {
          const double count = i < views ? pairs[i].size() : 1;
          coefficients.floats(i)[r] =
              static_cast<float>(count * factor[first + r] / (student_temperature * sums[i].sum[r]));
        }
      gradients->each([&](int64_t split, int64_t I) {
        float* const of_student = scaled.floats(slot(threads));
        auto* const left = half ? static_cast<at::BFloat16*>(narrow[slot(threads)]) : nullptr;
        const LogitShape shape = student.shape(x[0], I, J);
        const auto scale_view = [&](int64_t view, float c, float* out) {
          f.factors(coefficients.floats(view), sums[view].largest + I * cut.block, sums[view].top, padded,
                    shape.valid, c, out);
        };
        std::vector<const void*> targets;
        std::vector<const float*> target_factors;
        for (int64_t s = 0; s < views; ++s) {
          scale_view(s, student_c, of_student);
          targets.clear(), target_factors.clear();
          for (const Pair& pair : pairs[s]) {
            float* const out = of_student + (1 + targets.size()) * cut.block;
            scale_view(views + pair.teacher, teacher_c, out);
            targets.push_back(kept[I * kept_tiles + views + pair.teacher]);
            target_factors.push_back(out);
          }
          void* const E = kept[I * kept_tiles + s];
          auto* const right = half ? left + shape.classes * shape.rows : nullptr;
          f.weights(E, shape, of_student, targets.data(), target_factors.data(), targets.size(), nullptr, nullptr, left,
                    right);
          gradients->add(split, I, x[s], s, J, half ? left : E, half ? right : E);
        }
      });
      for (int64_t s = 0; s < views; ++s) gradients->finish_rows(x[s], s, J, scale, dx[s]);
    }
    if (gradients) gradients->finish_weight(scale);
  }

 private:
  float loss_of(const std::vector<std::vector<Pair>>& pairs, const std::vector<LogitSums>& sums, int64_t r) const {
    double total = 0;
    for (int64_t s = 0; s < views; ++s) {
      double distance = 0;
      for (const Pair& pair : pairs[s])
        distance += double(pair.distance[class_cut.blocks * cut.block + r]) / sums[views + pair.teacher].sum[r];
      if (!pairs[s].empty())
        total += pairs[s].size() * std::log(double(sums[s].sum[r])) + distance / student_temperature;
    }
    return static_cast<float>(total);
  }
};

// A vector of that many float32.
const float* floats_of(const char* name, const Tensor& vector, int64_t rows) {
  check_vectors(name, rows, {vector});
  return vector.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor> prototype_distillation_loss(
    const Tensor& student, const Tensor& student_prototypes, const Tensor& teacher, const Tensor& teacher_prototypes,
    const std::optional<Tensor>& center, const std::optional<Tensor>& weight_, double student_temperature,
    double teacher_temperature, bool unlike_views, bool derive, c10::string_view precision) {
  check(student, student_prototypes, teacher, teacher_prototypes, unlike_views);
  TORCH_CHECK_VALUE(weight_ || !derive, "weight must be given where gradients are taken");
  const PrototypeDistillation task(student, student_prototypes, teacher, teacher_prototypes, center,
                                   student_temperature, teacher_temperature, unlike_views, derive, precision);
  const Tensor weight = weight_ ? weight_->contiguous() : Tensor();
  const float* const weights = weight_ ? floats_of("weight", weight, task.rows) : nullptr;
  const auto gradient_of = [&](const Tensor& z) {
    std::vector<int64_t> sizes = z.sizes().vec();
    if (!derive) sizes[0] = 0;
    return at::empty(sizes, z.options());
  };
  const Tensor dx = gradient_of(student), dw = gradient_of(student_prototypes);
  const Tensor loss = at::empty({task.rows}, at::kFloat);
  float* const losses = loss.mutable_data_ptr<float>();
  task.run(losses, derive, weights, 1, dx, dw);
  if (!weight_) return {loss, dx, dw};  // the pointer is null for a batch of no rows too
  double total = 0;
  for (int64_t i = 0; i < task.rows; ++i) total += static_cast<double>(weights[i]) * losses[i];
  return {scalar(total), dx, dw};
}

std::tuple<Tensor, Tensor> prototype_distillation_loss_backward(
    const Tensor& grad_loss, const Tensor& student, const Tensor& student_prototypes, const Tensor& teacher,
    const Tensor& teacher_prototypes, const std::optional<Tensor>& center, const std::optional<Tensor>& weight,
    double student_temperature, double teacher_temperature, bool unlike_views, c10::string_view precision) {
  check(student, student_prototypes, teacher, teacher_prototypes, unlike_views);
  const PrototypeDistillation task(student, student_prototypes, teacher, teacher_prototypes, center,
                                   student_temperature, teacher_temperature, unlike_views, true, precision);
  const Tensor factor = (weight ? *weight : grad_loss).contiguous();
  const float scale = weight ? grad_loss.item<float>() : 1;  // the bits of what the forward pass takes, and scales
  const Tensor dx = at::empty(student.sizes(), student.options());
  const Tensor dw = at::empty(student_prototypes.sizes(), student_prototypes.options());
  task.run(nullptr, true, floats_of(weight ? "weight" : "grad_loss", factor, task.rows), scale, dx, dw);
  return {dx, dw};
}

FASTSSL_KERNELS(CPU, m) {
  implement<&prototype_distillation_loss, 4>(m, "prototype_distillation_loss");
  implement<&prototype_distillation_loss_backward, 5>(m, "prototype_distillation_loss_backward");
}

}  // namespace
}  // namespace fastssl

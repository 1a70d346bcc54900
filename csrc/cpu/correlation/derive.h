// From the gradients of standardised columns to those of the views, panel by panel.
//
// A panel is read once more and its gradient is finished, including the derivative of the standardisation, which needs
// nothing but the column itself.
#pragma once

#include <algorithm>
#include <vector>

#include "correlation/loss.h"

namespace fastssl::correlation {

// Writes the gradients of the views, times `factor`, into `out`. `product(v, p, panel, free, out)` computes the P of
// `finish` for panel p of view v; each thread calls `done` when it has no more panels.
template <typename Product, typename Done>
void derive(const Panels& panels, const Loss& loss, bool dual, const Tensor& diagonals, float factor,
            const std::vector<Tensor>& out, const Product& product, const Done& done) {
  const int views = panels.views.count(), threads = panels.threads;
  const int64_t elements = panels.elements();
  const int64_t terms_at = std::max(panels.rows.block * panels.width, panels.scratch());
  const Blocks scratch(threads, ((views + 1) * elements + terms_at + 2 * panels.width) * 4);
  run(threads, panels.count, [&](int64_t p) {
    float* const P = scratch.floats(slot(threads));
    float* const panel[2] = {P + elements, P + views * elements};
    float* const free = P + (views + 1) * elements;
    for (int v = 0; v < views; ++v) panels.standardise(v, p, panel[v], free);
    if (loss.cross()) panels.compare(p, panel, free);  // whose results loss.terms reads
    for (int v = 0; v < views; ++v) {
      product(v, p, panel, free, P);
      const int gram = loss.cross() ? 1 - v : v;
      panels.finish(p, v, P, panel, dual ? diagonals[gram].const_data_ptr<float>() : nullptr,
                    static_cast<float>(loss.alpha()), loss.terms(panels, p, v, dual, free + terms_at),
                    loss.projection(), static_cast<float>(loss.pull()), factor, free, out[v]);
    }
  }, done);
}

}  // namespace fastssl::correlation

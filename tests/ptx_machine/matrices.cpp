// A warp's operations on matrices: ldmatrix, stmatrix, mma.sync.
#include "tensor_core.h"

namespace ptx_machine {

Sums sums = Sums::kExact;
void set_sums(Sums how) { sums = how; }

namespace {

template <bool kTranspose>
void ldmatrix(Warp& w, const Ins& i, u32 m) {  // n matrices
  need(w, i, i.a[0], m, "an address");
  std::array<std::array<u16, 64>, 4> matrix;
  for (u32 k = 0; k < i.n; ++k)
    for (u32 r = 0; r < 8; ++r) {
      const u32 lane = k * 8 + r, at = static_cast<u32>(address_of(w, i, i.a[0], lane));
      if (at % 16 != 0) fail(w, &i, "ldmatrix: a row is not aligned to 16 bytes");
      shared_read(w, i, at, 16, lane, &matrix[k][r * 8]);
    }
  for (u32 k = 0; k < i.n; ++k) {
    auto d = target<u32>(w, i.list[k]);
    for (int l = 0; l < 32; ++l) {
      const int r = l / 4, c = l % 4 * 2;
      const u32 low = kTranspose ? matrix[k][c * 8 + r] : matrix[k][r * 8 + c];
      const u32 high = kTranspose ? matrix[k][(c + 1) * 8 + r] : matrix[k][r * 8 + c + 1];
      d[l] = low | high << 16;
    }
    set_valid(w, i.list[k], ~0u, ~0u);
  }
}

template <bool kTranspose>
void stmatrix(Warp& w, const Ins& i, u32 m) {
  need(w, i, i.a[0], m, "an address");
  for (u32 k = 0; k < i.n; ++k) {
    auto d = source32(w, i.list[k]);
    need(w, i, i.list[k], m, "the value of a store");
    for (u32 r = 0; r < 8; ++r) {
      u16 row[8];
      for (u32 c = 0; c < 8; ++c) {
        const u32 from = kTranspose ? c * 4 + r / 2 : r * 4 + c / 2, half = kTranspose ? r % 2 : c % 2;
        row[c] = static_cast<u16>(d[from] >> 16 * half);
      }
      const u32 lane = k * 8 + r;
      shared_write(w, i, static_cast<u32>(address_of(w, i, i.a[0], lane)), 16, lane, row);
    }
  }
}

// d [16, 8] = a [16, 16] b [16, 8] + c, halves in, floats out. With g = lane / 4 and t = lane % 4 a lane holds of
// a (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); of b (2t.., g), (2t + 8.., g); of d (g, 2t..), (g + 8, 2t..).
void mma(Warp& w, const Ins& i, u32 m) {
  if (m != ~0u) fail(w, &i, "mma.sync by part of a warp");
  for (auto* list : {&i.list2, &i.list3, &i.list4})
    for (auto& s : *list) need(w, i, s, m, "a product's operand");
  double a[16][16], b[16][8];
  float d[16][8];
  for (u32 l = 0; l < 32; ++l) {
    const u32 g = l / 4, t = l % 4 * 2;
    for (u32 k = 0; k < 4; ++k) {
      const u32 v = source32(w, i.list2[k])[l], r = g + k % 2 * 8, c = t + k / 2 * 8;
      a[r][c] = half_value(v), a[r][c + 1] = half_value(v >> 16);
      d[g + k / 2 * 8][t + k % 2] = std::bit_cast<float>(source32(w, i.list4[k])[l]);
    }
    for (u32 k = 0; k < 2; ++k) {
      const u32 v = source32(w, i.list3[k])[l];
      b[t + k * 8][g] = half_value(v), b[t + k * 8 + 1][g] = half_value(v >> 16);
    }
  }
  for (int r = 0; r < 16; ++r) add_products(a[r], b, d[r], kAmpere);
  for (u32 k = 0; k < 4; ++k) {
    auto out = target<u32>(w, i.list[k]);
    for (u32 l = 0; l < 32; ++l) out[l] = std::bit_cast<u32>(d[l / 4 + k / 2 * 8][l % 4 * 2 + k % 2]);
    set_valid(w, i.list[k], ~0u, ~0u);
  }
}

}  // namespace

bool decode_matrices(Ins& i, const Parsed& p, Names& names) {
  const std::string& o = p.op[0];
  if (o == "ldmatrix" || o == "stmatrix") {
    if (!p.has("m8n8") || p.type() != "b16" || !p.has("aligned")) not_implemented(p);
    const bool is_load = o == "ldmatrix", transposed = p.has("trans");
    i.n = p.has("x4") ? 4 : p.has("x2") ? 2 : 1;
    i.a[0] = decode_address(i, p.operand[is_load ? 1 : 0], names, 4);
    i.list = names.values(p.operand[is_load ? 0 : 1], 4);
    if (is_load) i.execute = transposed ? ldmatrix<true> : ldmatrix<false>;
    else i.execute = transposed ? stmatrix<true> : stmatrix<false>;
  } else if (o == "mma") {
    if (!p.starts("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")) not_implemented(p);
    i.list = names.values(p.operand[0], 4), i.list2 = names.values(p.operand[1], 4);
    i.list3 = names.values(p.operand[2], 4), i.list4 = names.values(p.operand[3], 4);
    if (i.list.size() != 4 || i.list2.size() != 4 || i.list3.size() != 2 || i.list4.size() != 4) not_implemented(p);
    i.execute = mma;
  } else {
    return false;
  }
  i.flow = kCollective;
  return true;
}

}  // namespace ptx_machine

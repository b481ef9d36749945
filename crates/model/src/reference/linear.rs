//! A weight matrix times one row: `out[r] = sum over c of matrix[r, c] * x[c]`, f32, in column order.

/// `matrix`: `[rows, cols]` row-major; `x`: `[cols]`; `out`: `[rows]`.
///
/// # Panics
/// When the lengths do not fit.
pub fn linear(matrix: &[f32], x: &[f32], out: &mut [f32]) {
    assert_eq!(
        matrix.len(),
        x.len() * out.len(),
        "matrix is [{}, {}]",
        out.len(),
        x.len()
    );
    for (out, row) in out.iter_mut().zip(matrix.chunks_exact(x.len())) {
        *out = row.iter().zip(x).map(|(w, x)| w * x).sum();
    }
}

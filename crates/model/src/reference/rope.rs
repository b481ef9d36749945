//! Rotary position embedding over the leading dimensions of a head, rotate-half ("neox") pairing:
//! dimension `i` turns with `i + dims / 2` by the angle `position * theta^(-2 i / dims)`.

/// Rotates every head of one row in place. `heads`: `[count, head_dim]`; the first `dims` columns of
/// each turn, the rest stay.
pub fn rope(heads: &mut [f32], head_dim: usize, dims: usize, theta: f32, position: u32) {
    let half = dims / 2;
    for head in heads.chunks_exact_mut(head_dim) {
        for i in 0..half {
            let (sin, cos) = angle(position, i, dims, theta).sin_cos();
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }
}

/// Angle of pair `i` at `position`, in radians: the inverse frequency and the product are rounded
/// to f32, as the public implementations do.
#[must_use]
pub fn angle(position: u32, i: usize, dims: usize, theta: f32) -> f32 {
    let inverse = 1.0 / f64::from(theta).powf(2.0 * i as f64 / dims as f64);
    position as f32 * inverse as f32
}

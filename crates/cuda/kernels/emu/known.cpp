// The resident kernel compiled for one model's shapes, the drafted pair of tests/emulated/known.rs, beside the one for every model.
#include "dev.cuh"
namespace known {
#include "shapes_known.h"
#include "resident_linear.cuh"
}
void known_body(const void* args) { known::resident_body(*(const known::StepArgs*)args); }

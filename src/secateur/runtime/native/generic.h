// Kernels in the compiler's own vectors; a tier replaces what it can do better. Included once by each tier, which says how
// many floats its registers hold (SEC_LANES) and how many rows a product takes at a time (SEC_ROWS).
#include "vectors.h"

#include "attention.h"
#include "products.h"
#include "rows.h"

"""Every threshold by which `vggrow init` chooses, each with where it comes from.

Sources: "cells" are trials on 1,557 / 333 / 333 solar cells (train, val, test), from scratch with net A, and linear models on
ImageNet's VGG-16; settings were chosen on val. AUC is val's. "Sec." is the paper's section. "Ours" is judgement, not measured.
"""

from typing import NamedTuple


class Size(NamedTuple):
    """How large a net from scratch is made for a training set of so many pictures."""

    train_pictures: int     # from so many on
    width: float
    crop: int               # pixels
    batch: int
    source: str


# fmt: off
SIZES = (
    Size(0,      0.125, 64,  16,  "cells: crop 64 AUC .873, 96 .864; width 1/8 .873, 1/4 .850"),
    Size(5_000,  0.25,  96,  32,  "ours, between the cells and the paper"),
    Size(20_000, 0.5,   128, 64,  "ours, between the cells and the paper"),
    Size(50_000, 1.0,   224, 256, "Sec. 3.1, for 1,281,167 pictures; that it begins here is ours"),
)

SMALLEST_CROP     = 32          # five poolings halve it five times (Table 1)
PAPER_SCALE       = 256 / 224   # S to crop (Sec. 3.1)
PAPER_EPOCHS      = 74          # Sec. 3.1
DEEPER_FROM       = 20_000      # train pictures from which D is trained from A; cells: D from A AUC .872, A alone .880

# What a view is.
WHOLE_SPREAD      = 1.25        # 95 % over 5 % quantile of width/height up to which a whole picture is squeezed; ours
WHOLE_ASPECT      = 2.0         # and the median may be so oblong at most; ours
#                                 cells: whole pictures at 64 px AUC .866, crops of 64 out of S = 72 .832, three seeds each

# The optimiser, from scratch and below the paper's size. cells: AUC .893 for all of it together, three seeds.
LEARNING_RATE     = 1e-2        # cells: 1e-2 AUC .873, 3e-3 .860; also the paper's (Sec. 3.1)
LABEL_SMOOTHING   = 0.1         # cells: AUC .889 with, .873 without, one view
WARMUP_SHARE      = 0.05        # cells: part of the recipe that was best
ITERATIONS        = 3_700       # cells: 38 epochs of 98 iterations; five times as many were no better
FEWEST_EPOCHS     = 30          # ours
MOST_EPOCHS       = 150         # ours

# A linear stage on published weights.
GROUPS            = (3, 4)      # cells: AUC .943 at 96 px; group 3 .927, 4 .941, 5 .892; 3 to 5 .937
SCALES            = ((96, 160), (96,))    # cells: AUC .947, .943
SCALE_TO_SIDE     = 2.0         # scales are at most so many times the median shorter side; ours
SMALL_SCALES      = (32, 64)    # of pictures too small for these; lowest loss on faces of 25 px and digits of 8 px
#                                 (docs/benchmarks/init.md)
FAST_SCALES       = (64,)       # where time or memory allow no more; cells: AUC .914
#                                 Views: mirrored and turned ones did not help the linear model on the cells.

# Splits.
SHARES            = (0.05, 0.1, 0.15, 0.2, 0.25)     # of val, test and gate each, that may be chosen
USUAL_SHARE       = 0.15        # the demo's
LARGEST_SHARE     = 0.2         # unless the smallest class needs more; ours
ENOUGH_IN_TEST    = 5_000       # one standard error of an accuracy is 0.7 points at most then; smaller shares from there on
TOO_FEW_IN_TEST   = 100         # one standard error is up to 5 points; larger shares below that
UNEVEN            = 1.5         # largest to smallest class, from which the gate goes by balanced accuracy; ours

# What this machine can do. GFLOP/s a core, a multiply-add counting two, one processor with bfloat16 in hardware (cells).
NARROW_GFLOPS     = {"bf16": 76.0, "fp32": 40.0}     # training net A at width 1/8, crop 64: 60,000 views in 50 CPU-seconds
WIDE_GFLOPS       = {"bf16": 170.0, "fp32": 85.0}    # D's first four groups, 2,223 pictures at 96 px in 67 CPU-seconds
GPU_GFLOPS        = {"bf16": 60_000.0, "fp32": 8_000.0}    # ours: a fraction of a current GPU's peak
LINEAR_HOURS      = 0.5         # the most that features may take
SCRATCH_HOURS     = {"cpu": 2.0, "gpu": 48.0}        # and training from scratch; then a smaller size; ours
CHEAP_HOURS       = 0.1         # a net from scratch beside a linear stage, for comparison; ours

# Operations of the nets at width 1 and crop 224 (`vggrow summary`), and what a picture's forward pass keeps (`vggrow plan`).
A_GMACS           = 7.6
D_GMACS           = 15.5
D_TO_GROUP_4_GMACS = 14.0
GROUP_CHANNELS    = {3: 256, 4: 512}                 # Table 1
KEPT_MIB          = {"bf16": 41.0, "fp32": 70.0}     # of net D
UNKNOWN_GIB       = 8.0         # taken for a machine's memory where it cannot be read; ours
MEMORY_SHARE      = 0.6         # of the GPU's, or of this machine's memory, for what a forward pass keeps
# fmt: on

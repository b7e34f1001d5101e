"""What sample inputs tell about a layer before it is replaced."""

from tilewright.convert.calibrate.binding import ForwardFunction, Sample, arguments
from tilewright.convert.calibrate.memory import CALIBRATION_MEMORY, Memory
from tilewright.convert.calibrate.observers import Observer, check_observer
from tilewright.convert.calibrate.rows import (
    MAX_ROWS,
    Found,
    OutputErrors,
    RowSample,
    observe,
    output_error,
    relative_error,
    sampling,
)
from tilewright.convert.calibrate.running import call, evaluation, first_input, first_of, listening, run
from tilewright.convert.calibrate.samples import Transform, samples
from tilewright.convert.calibrate.smoothing import search_smoothing

"""Evaluation: several sampled responses to every problem of some benchmarks, and what they say of the model.

benchmarks.py   the problems and how to sample on them          statistics.py   avg@k, pass@k, maj@k, intervals
records.py      every judged response on disk, to go on from     report.py       JSON, Markdown, console, TensorBoard
evaluator.py    generation on engines                            compare.py      two reports, paired
command.py      megatron-gppo eval                               training.py     evaluation within a run
"""

from megatron_gppo.evaluate.benchmarks import Benchmark, load_benchmarks
from megatron_gppo.evaluate.compare import compare_reports
from megatron_gppo.evaluate.evaluator import Evaluator
from megatron_gppo.evaluate.records import EvaluationError
from megatron_gppo.evaluate.report import Report

__all__ = ["Benchmark", "EvaluationError", "Evaluator", "Report", "compare_reports", "load_benchmarks"]

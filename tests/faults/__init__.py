"""Faults injected on purpose: what is killed, cut, filled up or starved, and whether anything is lost by it. See README.md."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # for world, videos and generated

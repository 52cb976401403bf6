"""What a run will hold and send, before it is begun: bytes of each rank by kind, and bytes on the wire."""

from ds_memopt.plan.predict import DTYPES, RULES, Prediction, predict

__all__ = ["DTYPES", "RULES", "Prediction", "predict"]

"""Noise that every rank recomputes, and forwards at perturbed weights."""

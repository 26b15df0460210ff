"""Serve one frozen language model with many representation interventions (LoReFT)."""

"""Measuring: one batch without a server, a server under load, and the limits of the device."""

"""Flower clients and coordinator. Empty until federation is built."""

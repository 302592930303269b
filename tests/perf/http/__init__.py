"""Tests of the backend `http`."""

"""Every test of this room is watched for descriptors that it leaves open."""

from tests.harness.descriptors import in_child, no_descriptor_leaks

__all__ = ["in_child", "no_descriptor_leaks"]

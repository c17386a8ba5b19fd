"""stub"""
from snpc.build.base import Target
TRT = Target("trt","","",None,())
TRT_RTX = Target("trt-rtx","","",None,())

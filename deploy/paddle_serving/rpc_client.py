"""Ask the server over gRPC; needs grpcio and protobuf, not Paddle Serving.

    python rpc_client.py --url 127.0.0.1:18090
    python rpc_client.py --url 127.0.0.1:18090 --data_file texts.txt

From Python: `predict("127.0.0.1:18090", ["婚后生育一子。"])`.
"""

import json
import sys

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from http_client import ServerError, parse_args, run, unpack

PACKAGE = "baidu.paddle_serving.pipeline_serving"
METHOD = f"/{PACKAGE}.PipelineService/inference"
# The fields of Paddle Serving's pipeline_service.proto that are used: number, repeated, type.
MESSAGES = {
    "Request": {
        "key": (1, True, "TYPE_STRING"),
        "value": (2, True, "TYPE_STRING"),
        "name": (4, False, "TYPE_STRING"),
        "method": (5, False, "TYPE_STRING"),
    },
    "Response": {
        "err_no": (1, False, "TYPE_INT32"),
        "err_msg": (2, False, "TYPE_STRING"),
        "key": (3, True, "TYPE_STRING"),
        "value": (4, True, "TYPE_STRING"),
    },
}


def message_classes():
    """(Request, Response)."""
    field_proto = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="pipeline_client.proto", package=PACKAGE, syntax="proto3"
    )
    for message_name, fields in MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, (number, repeated, kind) in fields.items():
            label = "LABEL_REPEATED" if repeated else "LABEL_OPTIONAL"
            label, kind = getattr(field_proto, label), getattr(field_proto, kind)
            message.field.add(name=name, number=number, label=label, type=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptors = [pool.FindMessageTypeByName(f"{PACKAGE}.{name}") for name in MESSAGES]
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22 and later
        return [message_factory.GetMessageClass(d) for d in descriptors]
    return [message_factory.MessageFactory(pool).GetPrototype(d) for d in descriptors]


Request, Response = message_classes()


def call(url, request, timeout):
    """The server's Response; raises ServerError."""
    with grpc.insecure_channel(url, [("grpc.enable_http_proxy", 0)]) as channel:
        inference = channel.unary_unary(METHOD, Request.SerializeToString, Response.FromString)
        try:
            return inference(request, timeout=timeout)
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            raise ServerError(f"no answer from {url} ({reason})") from error


def predict(url, texts, timeout=60):
    """[(label names, scores)] of a list of texts, labels in the order of label.txt."""
    value = json.dumps(texts, ensure_ascii=False)
    reply = call(url, Request(key=["sentence"], value=[value], name="seq_cls"), timeout)
    return unpack(reply.err_no, reply.err_msg, reply.key, reply.value, len(texts))


def ready(url, timeout=5):
    """True if the server can answer."""
    try:
        return call(url, Request(method="ready"), timeout).err_no == 0
    except ServerError:
        return False


if __name__ == "__main__":
    sys.exit(run(parse_args(__doc__, None, "127.0.0.1:18090"), predict, ready))

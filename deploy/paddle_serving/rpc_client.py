"""Ask the server over gRPC; needs grpcio and protobuf, not Paddle Serving.

    python rpc_client.py --url 127.0.0.1:18090
    python rpc_client.py --url 127.0.0.1:18090 --data_file texts.txt

From Python: `predict("127.0.0.1:18090", ["婚后生育一子。"])`.
"""

import json
import sys

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from http_client import ServerError, parse_args, run, unpack

PACKAGE = "baidu.paddle_serving.pipeline_serving"
METHOD = f"/{PACKAGE}.PipelineService/inference"
# The fields of Paddle Serving's pipeline_service.proto that are used.
PROTO = """
message_type {
  name: "Request"
  field { name: "key" number: 1 label: LABEL_REPEATED type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_REPEATED type: TYPE_STRING }
  field { name: "name" number: 4 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "method" number: 5 label: LABEL_OPTIONAL type: TYPE_STRING }
}
message_type {
  name: "Response"
  field { name: "err_no" number: 1 label: LABEL_OPTIONAL type: TYPE_INT32 }
  field { name: "err_msg" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "key" number: 3 label: LABEL_REPEATED type: TYPE_STRING }
  field { name: "value" number: 4 label: LABEL_REPEATED type: TYPE_STRING }
}
"""


def message_class(name):
    file = descriptor_pb2.FileDescriptorProto(name="client.proto", package=PACKAGE, syntax="proto3")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(PROTO, file))
    descriptor = pool.FindMessageTypeByName(f"{PACKAGE}.{name}")
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22 and later
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(pool).GetPrototype(descriptor)


Request, Response = message_class("Request"), message_class("Response")


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


def call(url, request, timeout):
    """The server's Response; raises ServerError."""
    with grpc.insecure_channel(url, [("grpc.enable_http_proxy", 0)]) as channel:
        inference = channel.unary_unary(METHOD, Request.SerializeToString, Response.FromString)
        try:
            return inference(request, timeout=timeout)
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            raise ServerError(f"no answer from {url} ({reason})") from error


if __name__ == "__main__":
    sys.exit(run(parse_args(__doc__, None, "127.0.0.1:18090"), predict, ready))

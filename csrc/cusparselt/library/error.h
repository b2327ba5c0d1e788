// What went wrong in the library, in words that say what to do about it.
#pragma once

#include <stdexcept>
#include <string>

#include "api.h"

namespace nms::lt {

// Something cuSPARSELt refused or failed at.
class Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status(status) {}

  const Status status;
};

// "CUSPARSE_STATUS_NOT_SUPPORTED (10)"
std::string status_name(Status status);

// Throws Error unless status is success: names the version, the call, the status, `what` was attempted and what helps.
void check(const Api& api, Status status, const char* call, const std::string& what);

}  // namespace nms::lt
